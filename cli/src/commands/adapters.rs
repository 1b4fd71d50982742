//! What the tools on adapters share: opening files with or without a base, keys that are left over, and how energy is shown.

use std::{collections::BTreeSet, path::Path};

use lora_core::format::{
    AdaptedModule, AdapterFile, BaseModel, Component, Dialect, Dtype, Family, TensorFile, Warning, guess_family,
    write_adapter_file, write_alone,
};

use super::locate;
use crate::{
    Failure,
    failure::{as_argument, printable, shell_word},
    text,
    ui::Ui,
};

/// Keys and modules that are named; the rest is counted.
pub(crate) const NAMED: usize = 8;

/// Adapter files that are read against one base, or against what they imply.
pub(crate) struct Adapters {
    files: Vec<TensorFile>,
    base: Option<BaseModel>,
}

impl Adapters {
    /// Opens files of which one tool needs all in the same words.
    ///
    /// With a base they are read against it. Without, each is read alone if all use one spelling, and otherwise against the
    /// published model that they are for.
    ///
    /// # Errors
    /// If a file is broken, or spellings differ and no published model has the modules.
    pub(crate) fn open(paths: &[&Path], base: Option<&Path>) -> Result<Self, Failure> {
        let files: Vec<TensorFile> =
            paths.iter().map(|path| TensorFile::read_adapter(path)).collect::<Result<_, _>>()?;
        let base = match base {
            Some(base) => Some(BaseModel::open(&locate(base)?)?),
            None if one_spelling(&files) => None,
            None => Some(published(&files).ok_or_else(|| not_alike(paths, &files))?),
        };
        Ok(Self { files, base })
    }

    /// The same files, to be read against the published model that they are for; unchanged if there is none, or a base is
    /// there.
    pub(crate) fn or_published(self) -> Self {
        let base = self.base.or_else(|| published(&self.files));
        Self { base, ..self }
    }

    /// The base, where there is one; one that was published has no numbers.
    pub(crate) fn base(&self) -> Option<&BaseModel> {
        self.base.as_ref()
    }

    /// Reads every file.
    ///
    /// # Errors
    /// If one does not fit the base.
    pub(crate) fn read(&self) -> Result<Vec<AdapterFile>, Failure> {
        let read = (0..self.files.len()).map(|index| {
            let (mut read, modules) = self.read_each(index, &Ok)?;
            read.modules = modules;
            Ok(read)
        });
        read.collect()
    }

    /// Reads one file, its adapters going through `each` as soon as they are made.
    ///
    /// # Errors
    /// If it does not fit the base, and what `each` returns.
    pub(crate) fn read_each<T: Send>(
        &self,
        index: usize,
        each: &(dyn Fn(AdaptedModule) -> lora_core::Result<T> + Sync),
    ) -> Result<(AdapterFile, Vec<T>), Failure> {
        let file = &self.files[index];
        let read = match &self.base {
            Some(base) => AdapterFile::of_each(file, base, each),
            None => AdapterFile::of_alone_each(file, each),
        };
        Ok(read?)
    }

    /// Writes adapters in the spelling of the first file, which `kept` keys come from.
    ///
    /// # Errors
    /// If the spelling has no words for one of them, or the file cannot be written.
    pub(crate) fn write(
        &self,
        out: &Path,
        file: &AdapterFile,
        kept: &BTreeSet<&str>,
        dtype: Option<Dtype>,
    ) -> Result<(), Failure> {
        match &self.base {
            Some(base) => write_adapter_file(out, file.dialect, base.family(), file, dtype)?,
            None => write_alone(out, &self.files.iter().collect::<Vec<_>>(), file, kept, dtype)?,
        }
        Ok(())
    }
}

/// Refuses keys that no adapter takes, unless the person said that they may be left over.
///
/// # Errors
/// If there are such keys and `allow` is false.
pub(crate) fn account(read: &AdapterFile, allow: bool, ui: &Ui) -> Result<(), Failure> {
    let name = read.path.display().to_string();
    for warning in warning_lines(read.warnings.iter()) {
        ui.warn(&format!("{}: {warning}", printable(&name)));
    }
    if read.unapplied.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        read.unapplied.iter().map(|(key, reason)| format!("{}: {reason}", key_name(key))).collect();
    let message = format!("{} of {} keys of {name} belong to no adapter", lines.len(), read.keys);
    if allow {
        ui.warn(&printable(&message));
        lines.iter().for_each(|line| ui.say(&format!("  {line}")));
        return Ok(());
    }
    let mut failure = lines.iter().take(NAMED).fold(Failure::new("unmatched_keys", message), Failure::detail);
    if lines.len() > NAMED {
        failure = failure.detail(format!("and {} more", lines.len() - NAMED));
    }
    let keys: Vec<&str> = read.unapplied.iter().map(|(key, _)| &**key).collect();
    Err(failure
        .hint("`--allow-unmatched` goes on without them; a `--base` may know more of them")
        .with("path", name)
        .with("unapplied", keys))
}

/// Says that the embeddings bundled with an adapter stay behind, if there are any.
pub(crate) fn leave_embeddings(name: &str, embeddings: &[String], ui: &Ui) {
    if !embeddings.is_empty() {
        let count = text::plural(embeddings.len() as u64, "tensor");
        let name = printable(name);
        ui.warn(&format!("{name}: {count} of bundled textual inversions are no adapters and stay behind"));
    }
}

/// Warnings, those about an alpha of 0 in one line.
pub(crate) fn warning_lines<'a>(warnings: impl Iterator<Item = &'a Warning>) -> Vec<String> {
    let (alphas, others): (Vec<&Warning>, Vec<&Warning>) = warnings.partition(|warning| warning.is_of_alpha());
    let first = alphas.first().map(|first| match alphas.len() - 1 {
        0 => first.to_string(),
        more => format!("{first}, and so are {} more", text::thousands(more as u64)),
    });
    first.into_iter().chain(others.into_iter().map(ToString::to_string)).collect()
}

/// A key or a module out of a file, safe for a terminal; the empty one is shown as well.
pub(crate) fn key_name(key: &str) -> String {
    if key.is_empty() { "\"\"".to_owned() } else { printable(key) }
}

/// Whether all files call one module by one name, as far as their keys tell.
fn one_spelling(files: &[TensorFile]) -> bool {
    let spelling = |file: &TensorFile| {
        let has = |words: &[&str]| file.names().any(|name| words.iter().any(|word| name.contains(word)));
        let dialect = lora_core::format::guess_dialect(file.names());
        (
            dialect,
            has(&["input_blocks", "output_blocks", "middle_block"]),
            has(&["down_blocks", "up_blocks", "mid_block"]),
        )
    };
    let spellings: Vec<(Dialect, bool, bool)> = files.iter().map(spelling).collect();
    spellings.windows(2).all(|pair| {
        let ((dialect, ldm, diffusers), (other, other_ldm, other_diffusers)) = (pair[0], pair[1]);
        // A file may lack the UNet; two that have one must agree on whose names it has.
        dialect == other && !(ldm && other_diffusers) && !(diffusers && other_ldm)
    })
}

/// The published model that all files are for.
fn published(files: &[TensorFile]) -> Option<BaseModel> {
    let mut families = files.iter().filter_map(guess_family);
    let family = families.next()?;
    let family = match family {
        _ if families.any(|other| other != family) => return None,
        "Stable Diffusion 2.x" => Family::Sd2,
        "Stable Diffusion XL" => Family::Sdxl,
        "Stable Diffusion 1.x" | "Stable Diffusion 1.x or 2.x" => Family::Sd1,
        _ => return None,
    };
    let base = BaseModel::standard(&family)?;
    // Models of other sizes share the names alone.
    files.iter().all(|file| AdapterFile::of(file, &base).is_ok()).then_some(base)
}

/// Why files cannot be taken together: they are for different models, or a base must say what their names mean.
fn not_alike(paths: &[&Path], files: &[TensorFile]) -> Failure {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let families: Vec<(&str, &String)> =
        files.iter().zip(&names).filter_map(|(file, name)| Some((guess_family(file)?, name))).collect();
    let differ = |pair: &[(&str, &String)]| !may_be_one(pair[0].0, pair[1].0);
    if let Some(&[(first, one), (second, other)]) = families.windows(2).find(|pair| differ(pair)) {
        return Failure::new("base_mismatch", format!("{one} and {other} are for different models"))
            .detail(format!("{one}: {first}"))
            .detail(format!("{other}: {second}"))
            .hint("no base has the modules of both: take adapters for one model")
            .with("paths", names);
    }
    Failure::new("spellings_differ", format!("{} spell their modules in different ways", names.join(" and ")))
        .hint("`--base BASE` names the model that they are for, so that both can be understood")
        .with("paths", names)
}

/// Whether two families, as they are guessed from keys, can be the same.
fn may_be_one(one: &str, other: &str) -> bool {
    const EITHER: &str = "Stable Diffusion 1.x or 2.x";
    let is_one_of_them = |family: &str| ["Stable Diffusion 1.x", "Stable Diffusion 2.x"].contains(&family);
    one == other || (one == EITHER && is_one_of_them(other)) || (other == EITHER && is_one_of_them(one))
}

/// A share as a person reads it: `97.3 %`.
pub(crate) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    // Nothing but all of it is 100 %.
    let digits = if share < 1.0 && percent > 99.9 { 3 } else { 1 };
    let floored = (percent * 10_f64.powi(digits)).floor() / 10_f64.powi(digits);
    format!("{floored:.*} %", digits as usize)
}

/// Lines on how much of each module's energy is left: mean and least, and the modules that lost most.
pub(crate) fn energy_lines(energies: &[(Component, &str, f64)]) -> Vec<String> {
    if energies.is_empty() {
        return Vec::new();
    }
    let mean = energies.iter().map(|(_, _, energy)| energy).sum::<f64>() / energies.len() as f64;
    let mut sorted: Vec<_> = energies.iter().collect();
    sorted.sort_by(|a, b| a.2.total_cmp(&b.2));
    let mut lines = vec![format!(
        "Energy     {} kept on average, {} at least",
        percent(mean),
        percent(sorted.first().map_or(1.0, |e| e.2))
    )];
    const WORST: usize = 3;
    lines.extend(sorted.iter().take(WORST).filter(|(_, _, energy)| *energy < 1.0 - 1e-6).map(
        |(component, path, energy)| format!("           {:>8}  {}", percent(*energy), printable(&component.with(path))),
    ));
    lines
}

/// `rank 32`, or `ranks 4 to 32`.
pub(crate) fn ranks(ranks: impl Iterator<Item = usize> + Clone) -> String {
    match (ranks.clone().min(), ranks.max()) {
        (Some(least), Some(most)) if least == most => format!("rank {least}"),
        (Some(least), Some(most)) => format!("ranks {least} to {most}"),
        _ => "no rank".to_owned(),
    }
}

/// `FILE (45.1 MiB)`.
pub(crate) fn file_line(out: &Path) -> String {
    let file = if out.is_dir() { out.join("adapter_model.safetensors") } else { out.to_owned() };
    let bytes = std::fs::metadata(&file).map_or(0, |meta| meta.len());
    format!("File       {} ({})", printable(&out.display().to_string()), text::bytes(bytes))
}

/// A hint with the one command that shows what a file is.
pub(crate) fn inspect_hint(path: &Path) -> String {
    format!("what it is: `lora inspect {}`", shell_word(&as_argument(path)))
}
