//! Adapter files on a loaded model, by short names, so that a person can switch between them.

use std::path::Path;

use lora_cli::{
    Failure,
    options::values::{LoraFile, Strength},
    text,
    ui::Ui,
};
use lora_core::format::{AdapterFile, BaseModel, Reason, Strengths};
use lora_torch::{Attachments, Projection};
use serde_json::{Value, json};

use crate::failures::Explain as _;

/// No adapter at all, one word that no adapter has as its name.
const NONE: &str = "none";

/// All adapters, each as strong as it was asked for first; no adapter has this name either.
const ALL: &str = "all";

/// Adapters on a model; which of them act, and how strongly, can be changed without loading anything again.
#[derive(Debug)]
pub(crate) struct Adapters {
    list: Vec<Named>,
    attachments: Attachments,
}

#[derive(Debug)]
struct Named {
    /// What a person calls it: the file's name or the run's.
    name: String,
    file: LoraFile,
    now: Strength,
}

/// Some strengths with a name.
#[derive(Debug)]
pub(crate) struct Variant {
    /// `base`, an adapter's name, or several.
    pub(crate) label: String,
    /// One a file, in their order.
    pub(crate) strengths: Vec<Strength>,
}

/// Puts all files on a model's projections, each at its strength; a key that finds no place is an error that names it.
///
/// # Errors
/// If a file cannot be read, or does not fit the base.
pub(crate) fn attach(
    files: &[LoraFile],
    names: &BaseModel,
    projections: Vec<&mut Projection>,
    ui: &Ui,
) -> Result<Adapters, Failure> {
    let mut read: Vec<(AdapterFile, Strengths)> = Vec::new();
    for file in files {
        let adapter = AdapterFile::read(&file.path, names).explain()?;
        refuse_unapplied(&adapter, file)?;
        ui.say(&format!(
            "Adapter {} on {}, strength {}",
            file.path.display(),
            text::plural(adapter.modules.len() as u64, "module"),
            file.strength
        ));
        read.push((adapter, file.strength.into()));
    }
    let adapters: Vec<(&AdapterFile, &Strengths)> = read.iter().map(|(file, strengths)| (file, strengths)).collect();
    let attachments = lora_torch::attach(projections, &adapters).explain()?;
    let mut list: Vec<Named> = Vec::new();
    for file in files {
        let name = unused(&short_name(&file.path), &list);
        list.push(Named { name, file: file.clone(), now: file.strength });
    }
    Ok(Adapters { list, attachments })
}

impl Adapters {
    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Lets adapters act as strongly as `strengths` say, in the order of the files, on the model that they are on.
    ///
    /// # Errors
    /// If a part of one can only be merged into the base.
    pub(crate) fn set(&mut self, projections: Vec<&mut Projection>, strengths: &[Strength]) -> Result<(), Failure> {
        let all: Vec<Strengths> = strengths.iter().map(|strength| (*strength).into()).collect();
        self.attachments.set(projections, &all).explain()?;
        for (named, strength) in self.list.iter_mut().zip(strengths) {
            named.now = *strength;
        }
        Ok(())
    }

    /// The strengths that `words` ask for: `NAME[:STRENGTH]`, several of them, `none` or `all`. What is not named is off;
    /// a number stands for the adapter at that place, counted from 1.
    ///
    /// # Errors
    /// If there is no such adapter, or a strength is none.
    pub(crate) fn wanted(&self, words: &str) -> Result<Vec<Strength>, Failure> {
        let mut strengths = vec![Strength::all(0.0); self.list.len()];
        for word in words.split_whitespace() {
            match word {
                NONE => {}
                ALL => strengths = self.list.iter().map(|named| named.file.strength).collect(),
                _ => {
                    let (at, strength) = self.find(word)?;
                    strengths[at] = strength;
                }
            }
        }
        Ok(strengths)
    }

    fn find(&self, word: &str) -> Result<(usize, Strength), Failure> {
        let place = |name: &str| {
            let by_name = self.list.iter().position(|named| named.name == name);
            let number = || name.parse::<usize>().ok()?.checked_sub(1).filter(|at| *at < self.list.len());
            by_name.or_else(number)
        };
        if let Some(at) = place(word) {
            // One that was put down to nothing is meant to act when it is called.
            let asked = self.list[at].file.strength;
            return Ok((at, if asked == Strength::all(0.0) { Strength::ONE } else { asked }));
        }
        let names: Vec<&str> = self.list.iter().map(|named| named.name.as_str()).collect();
        let unknown = |name: &str| {
            Failure::new("no_such_adapter", format!("there is no adapter `{name}` here"))
                .hint(format!("/lora {}", [&names[..], &[ALL, NONE]].concat().join(" | ")))
        };
        let Some((name, strength)) = word.rsplit_once(':') else { return Err(unknown(word)) };
        let at = place(name).ok_or_else(|| unknown(name))?;
        let strength = strength.parse().map_err(|reason: String| {
            Failure::new("bad_strength", format!("{word}: {reason}")).hint(format!("/lora {name}:0.8"))
        })?;
        Ok((at, strength))
    }

    /// The base alone, each adapter alone, and all together if there are several: what a comparison shows.
    pub(crate) fn variants(&self) -> Vec<Variant> {
        let none = vec![Strength::all(0.0); self.list.len()];
        let mut variants = vec![Variant { label: "base".to_owned(), strengths: none.clone() }];
        for (at, named) in self.list.iter().enumerate() {
            let mut strengths = none.clone();
            strengths[at] = named.file.strength;
            variants.push(Variant { label: named.name.clone(), strengths });
        }
        if self.list.len() > 1 {
            let label = self.list.iter().map(|named| named.name.as_str()).collect::<Vec<_>>().join(" + ");
            let strengths = self.list.iter().map(|named| named.file.strength).collect();
            variants.push(Variant { label, strengths });
        }
        variants
    }

    /// A line an adapter: number, name, strength, file.
    pub(crate) fn describe(&self) -> String {
        let width = self.list.iter().map(|named| text::width(&named.name)).max().unwrap_or(0);
        let line = |(at, named): (usize, &Named)| {
            let pad = " ".repeat(width - text::width(&named.name));
            let strength = match named.now == Strength::all(0.0) {
                true => "off".to_owned(),
                false => named.now.to_string(),
            };
            format!("{:>2}  {}{pad}  {strength:<5} {}", at + 1, named.name, named.file.path.display())
        };
        self.list.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
    }

    /// The same for a program.
    pub(crate) fn to_json(&self) -> Value {
        let row = |named: &Named| {
            let file = named.file.path.to_string_lossy();
            json!({"name": named.name, "strength": named.now.unet, "file": file})
        };
        self.list.iter().map(row).collect()
    }
}

/// What a person calls an adapter: a run by its folder, a file by its name.
fn short_name(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().replace(char::is_whitespace, "-"));
    let folder = || path.file_name().map(|name| name.to_string_lossy().replace(char::is_whitespace, "-"));
    let name = match stem(&path).filter(|_| !path.is_dir()) {
        Some(name) if name == "adapter_model" => path.parent().and_then(stem),
        Some(name) => Some(name),
        None => folder(),
    };
    name.unwrap_or_else(|| "adapter".to_owned())
}

/// The name, or with a number behind it if it is taken.
fn unused(name: &str, list: &[Named]) -> String {
    let is_free = |name: &str| ![NONE, ALL, "base"].contains(&name) && list.iter().all(|named| named.name != name);
    let numbered = || (2..=list.len() + 2).map(|number| format!("{name}-{number}")).find(|name| is_free(name));
    if is_free(name) { name.to_owned() } else { numbered().unwrap_or_else(|| name.to_owned()) }
}

fn refuse_unapplied(read: &AdapterFile, file: &LoraFile) -> Result<(), Failure> {
    let Some((key, reason)) = read.unapplied.first() else { return Ok(()) };
    let why = match reason {
        Reason::NoModule(component) => format!("the base's {} has no such module", component.name()),
        Reason::NoComponent(component) => format!("the base has no {}", component.name()),
        Reason::OtherFamily(family) => format!("it belongs to {family}"),
        Reason::UnknownSuffix => "the end of its name is unknown".to_owned(),
        _ => "its name is unknown".to_owned(),
    };
    let count = read.unapplied.len();
    Err(Failure::new(
        "unapplied_keys",
        format!("{}: {count} of {} keys find no place in this base", file.path.display(), read.keys),
    )
    .detail(format!("the first is `{key}`: {why}"))
    .hint(format!("see all of them with `lora check {} --base BASE`", file.path.display()))
    .with("unapplied", count as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapters(names: &[&str]) -> Adapters {
        let mut list = Vec::new();
        for name in names {
            let file = LoraFile { path: format!("/nowhere/{name}").into(), strength: Strength::all(0.5) };
            list.push(Named { name: unused(&short_name(&file.path), &list), now: file.strength, file });
        }
        let attachments = lora_torch::attach([], &[]).unwrap();
        Adapters { list, attachments }
    }

    fn numbers(strengths: Result<Vec<Strength>, Failure>) -> Vec<f64> {
        strengths.unwrap().iter().map(|strength| strength.unet).collect()
    }

    #[test]
    fn adapters_are_called_by_name_or_number_and_the_rest_is_off() {
        let adapters = adapters(&["pirate.safetensors", "run-1/adapter_model.safetensors", "pirate.pt"]);
        let names: Vec<&str> = adapters.list.iter().map(|named| named.name.as_str()).collect();
        assert_eq!(names, ["pirate", "run-1", "pirate-2"]);
        assert_eq!(numbers(adapters.wanted("pirate")), [0.5, 0.0, 0.0]);
        assert_eq!(numbers(adapters.wanted("run-1:-0.25  pirate-2")), [0.0, -0.25, 0.5]);
        assert_eq!(numbers(adapters.wanted("2:1")), [0.0, 1.0, 0.0]);
        assert_eq!(numbers(adapters.wanted("none")), [0.0; 3]);
        assert_eq!(numbers(adapters.wanted("all")), [0.5; 3]);
        for wrong in ["nobody", "nobody:1", "0", "4", "pirate:strong"] {
            assert!(adapters.wanted(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn no_adapter_has_a_name_that_means_something_else() {
        assert_eq!(adapters(&["none", "all.safetensors"]).variants()[1].label, "none-2");
    }

    #[test]
    fn a_comparison_has_the_base_each_alone_and_all() {
        let labels = |names: &[&str]| -> Vec<String> {
            adapters(names).variants().into_iter().map(|variant| variant.label).collect()
        };
        assert_eq!(labels(&["a", "b"]), ["base", "a", "b", "a + b"]);
        assert_eq!(labels(&["a"]), ["base", "a"]);
        assert_eq!(labels(&[]), ["base"]);
    }
}
