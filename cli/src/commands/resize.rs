//! `lora resize`: an adapter file at another rank, with what was lost said module by module.

use std::{collections::BTreeSet, path::Path, time::Instant};

use lora_core::{
    format::{AdaptedModule, AdapterFile, Component, describe_network},
    resize::{Cut, Outcome, Resized, resize},
};
use serde_json::json;

use crate::{
    Failure,
    args::ResizeArgs,
    commands::{
        adapters::{Adapters, account, energy_lines, file_line, inspect_hint, ranks},
        output,
    },
    text,
    ui::Ui,
};

pub(crate) fn run(args: &ResizeArgs, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    let cut = cut(args.rank, args.energy)?;
    let mut adapters = Adapters::open(&[&args.input], args.base.as_deref())?;
    let (read, resized) = match cut_all(&adapters, &args.input, cut)? {
        (_, resized) if resized.iter().any(Option::is_none) => {
            // The published model of that family knows the kernels, unless the file is for another size.
            adapters = adapters.or_published();
            cut_all(&adapters, &args.input, cut)?
        }
        done => done,
    };
    account(&read, args.allow_unmatched, ui)?;
    let Some(resized) = resized.into_iter().collect::<Option<Vec<_>>>() else {
        return Err(Failure::new("needs_base", format!("{} stores kernels folded", args.input.display()))
            .detail("so what its LoHa or LoKr modules become has no shape that other programs know")
            .hint("name the model that it is for with `--base BASE`"));
    };
    if !resized.iter().any(|(resized, _)| !matches!(resized.outcome, Outcome::NoRank)) {
        return Err(Failure::new(
            "nothing_to_resize",
            format!("{} holds nothing that has a rank", args.input.display()),
        )
        .hint(inspect_hint(&args.input)));
    }
    let (resized, before): (Vec<Resized>, Vec<Option<usize>>) = resized.into_iter().unzip();
    let outcomes: Vec<Outcome> = resized.iter().map(|resized| resized.outcome).collect();
    let file = smaller(&read, resized.into_iter().map(|resized| resized.module).collect());
    let unapplied = read.unapplied.iter().map(|(key, _)| &**key);
    let kept: BTreeSet<&str> = read.embeddings.iter().map(String::as_str).chain(unapplied).collect();
    adapters.write(&args.out, &file, &kept, args.dtype.map(Into::into))?;
    report(args, (&file.modules, &outcomes), &before, start.elapsed().as_secs_f64(), ui)
}

/// Every module cut, with the rank that it had; `None` where its file hides the size of a kernel.
type AllCut = Vec<Option<(Resized, Option<usize>)>>;

fn cut_all(adapters: &Adapters, input: &Path, cut: Cut) -> Result<(AdapterFile, AllCut), Failure> {
    let numbers = |component: Component, name: &str| match adapters.base() {
        Some(base) => base.read(component, name),
        None => Ok(None),
    };
    adapters.read_each(0, &|module| {
        if adapters.base().is_none() && may_be_folded(&module) {
            return Ok(None);
        }
        let rank = module.adapter.rank();
        let name = module.component.with(&module.path);
        let resized = resize(module, &numbers, cut).map_err(|error| error.in_module(input, &name))?;
        Ok(Some((resized, rank)))
    })
}

/// What is kept, from the two options.
pub(crate) fn cut(rank: Option<std::num::NonZeroUsize>, energy: Option<f64>) -> Result<Cut, Failure> {
    let wrong = |error: lora_core::Error| {
        Failure::usage("option_invalid", error.to_string()).hint("for example `--energy 0.95`: the share that stays")
    };
    let energy = energy.map(|energy| Cut::energy(energy).map(|_| energy)).transpose().map_err(wrong)?;
    Ok(Cut { rank, energy })
}

/// The file with its new adapters and the metadata that fits them.
fn smaller(read: &AdapterFile, modules: Vec<AdaptedModule>) -> AdapterFile {
    let mut metadata = read.metadata.clone();
    describe_network(&mut metadata, &modules);
    if metadata.contains_key("ss_network_dim") {
        let dim = |metadata: &std::collections::BTreeMap<String, String>| metadata.get("ss_network_dim").cloned();
        let (old, new) = (dim(&read.metadata).unwrap_or_else(|| "?".into()), dim(&metadata).unwrap_or_default());
        let comment = read.metadata.get("ss_training_comment").filter(|comment| *comment != "None");
        let comment = comment.map_or(String::new(), |comment| format!("; {comment}"));
        metadata.insert("ss_training_comment".into(), format!("dimension is resized from {old} to {new}{comment}"));
    }
    AdapterFile {
        modules,
        metadata,
        path: read.path.clone(),
        replacements: read.replacements.clone(),
        embeddings: Vec::new(),
        unapplied: Vec::new(),
        warnings: Vec::new(),
        ..*read
    }
}

/// Whether a file that was read alone stores a family's kernels so that their size is lost.
fn may_be_folded(module: &AdaptedModule) -> bool {
    use lora_core::AnyAdapter::{Loha, Lokr};
    const LINEAR: [&str; 22] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out_0",
        "to_out.0",
        "proj_in",
        "proj_out",
        "net_0_proj",
        "net.0.proj",
        "net_2",
        "net.2",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "out_proj",
        "fc1",
        "fc2",
        "gate_proj",
        "up_proj",
        "down_proj",
        "qkv",
    ];
    matches!(module.adapter, Loha(_) | Lokr(_))
        && module.weight.len() == 2
        && !LINEAR.iter().any(|name| module.path.ends_with(name))
}

fn report(
    args: &ResizeArgs,
    (modules, outcomes): (&[AdaptedModule], &[Outcome]),
    before: &[Option<usize>],
    seconds: f64,
    ui: &Ui,
) -> Result<(), Failure> {
    let modules = || modules.iter().zip(outcomes.iter().copied());
    let energies: Vec<_> = modules()
        .filter_map(|(module, outcome)| match outcome {
            Outcome::Cut { energy, .. } => Some((module.component, &*module.path, energy)),
            _ => None,
        })
        .collect();
    if ui.json {
        let list: Vec<_> = modules()
            .zip(before)
            .map(|((module, outcome), before)| {
                let (rank, energy) = match outcome {
                    Outcome::Cut { to, energy, .. } => (Some(to), Some(energy)),
                    Outcome::Narrow { rank } => (Some(rank), Some(1.0)),
                    Outcome::NoRank => (None, None),
                };
                json!({"component": module.component.name(), "module": module.path, "rank_before": before,
                       "rank": rank, "energy": energy})
            })
            .collect();
        return ui
            .json_data(&json!({"out": args.out.to_string_lossy(), "modules": list, "seconds": seconds}))
            .map_err(output);
    }
    let after = modules().filter_map(|(module, _)| module.adapter.rank());
    let after: Vec<usize> = after.collect();
    let narrow = modules().filter(|(_, outcome)| matches!(outcome, Outcome::Narrow { .. })).count();
    let whole = modules().filter(|(_, outcome)| matches!(outcome, Outcome::NoRank)).count();
    let mut lines = Vec::new();
    if !energies.is_empty() {
        lines.push(format!(
            "Resized    {} in {}: the file had {}, now {}",
            text::plural(energies.len() as u64, "module"),
            text::duration(seconds),
            ranks(before.iter().flatten().copied()),
            ranks(after.iter().copied()),
        ));
    }
    if narrow > 0 {
        lines.push(format!("Kept       {} that are no wider than asked for", text::plural(narrow as u64, "module")));
    }
    if whole > 0 {
        lines.push(format!(
            "Kept       {} of norms and biases, which have no rank",
            text::plural(whole as u64, "difference")
        ));
    }
    lines.extend(energy_lines(&energies));
    lines.push(file_line(&args.out));
    ui.data(&lines.join("\n")).map_err(output)
}
