//! `lora mix`: several adapter files into one.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Instant,
};

use lora_core::{
    AnyAdapter,
    format::{AdapterFile, Strengths, describe_network},
    mix::{Ingredient, Method, MixError, Mixed, mix},
};
use serde_json::{Map, Value, json};

use super::{
    adapters::{Adapters, account, energy_lines, file_line, leave_embeddings, ranks},
    output,
    resize::cut,
};
use crate::{
    Failure,
    args::{MixArgs, Mixing},
    failure::DIVERGED,
    text,
    ui::Ui,
};

/// Metadata that is as true of the mixture as of its parts, where all of them agree.
const COMMON: [&str; 12] = [
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "ss_clip_skip",
    "format",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
];

pub(crate) fn run(args: &MixArgs, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    let method = method(args)?;
    let paths: Vec<&Path> = args.lora.iter().map(|lora| &*lora.path).collect();
    let adapters = Adapters::open(&paths, args.base.as_deref())?;
    let read_files = adapters.read()?;
    for read in &read_files {
        account(read, args.allow_unmatched, ui)?;
        if let Some(new) = read.replacements.first() {
            return Err(Failure::new("no_sum", format!("{} brings `{}` whole", read.path.display(), new.tensor))
                .detail("a whole tensor is no difference, so there is no sum of it")
                .hint("`lora merge` puts it into a base"));
        }
        leave_embeddings(&read.path.display().to_string(), &read.embeddings, ui);
    }
    let strengths: Vec<Strengths> = args.lora.iter().map(|lora| lora.strength.into()).collect();
    let ingredients: Vec<Ingredient<'_>> =
        read_files.iter().zip(&strengths).map(|(file, strengths)| Ingredient { file, strengths }).collect();
    let mixed = mix(&ingredients, method).map_err(refused)?;
    if mixed.is_empty() {
        return Err(Failure::new("nothing_to_mix", "every strength is 0, so there is nothing to mix")
            .hint("for example `--lora a.safetensors:0.7 --lora b.safetensors:0.5`"));
    }
    let modules: Vec<_> = mixed.iter().map(|mixed| mixed.module.clone()).collect();
    let mut metadata = metadata(&read_files);
    describe_network(&mut metadata, &modules);
    let first = &read_files[0];
    let file = AdapterFile {
        path: args.out.clone(),
        dialect: first.dialect,
        modules,
        replacements: Vec::new(),
        embeddings: Vec::new(),
        unapplied: Vec::new(),
        warnings: Vec::new(),
        metadata,
        keys: 0,
    };
    adapters.write(&args.out, &file, &BTreeSet::new(), args.dtype.map(Into::into))?;
    report(args, &mixed, start.elapsed().as_secs_f64(), ui)
}

fn method(args: &MixArgs) -> Result<Method, Failure> {
    let cut = cut(args.rank, args.energy)?;
    if args.method != Mixing::Svd && (args.rank.is_some() || args.energy.is_some()) {
        return Err(Failure::usage("usage", "`--rank` and `--energy` belong to `--method svd`")
            .hint("`--method svd --rank 32` cuts the sum; `concat` keeps all of it"));
    }
    Ok(match args.method {
        Mixing::Concat => Method::Concat,
        Mixing::Svd => Method::Svd(cut),
        Mixing::Linear => Method::Linear,
    })
}

fn refused(error: MixError) -> Failure {
    let failure = |code| Failure::new(code, error.to_string());
    match error {
        MixError::NoSum { .. } => failure("no_sum")
            .hint("`lora merge` applies such adapters to a base one after the other, in the order of `--lora`"),
        MixError::NoPair { .. } => {
            failure("no_pair").hint("`--method svd --rank 32` takes LoHa, LoKr and full differences too")
        }
        MixError::Ranks { .. } => {
            failure("ranks_differ").hint("`--method concat` takes any ranks; `lora resize` makes them equal")
        }
        MixError::Indecomposable { .. } => failure("not_finite").hint(DIVERGED),
        MixError::Shapes { .. } => failure("base_mismatch").hint("`lora inspect FILE` says what each file is for"),
        MixError::Other(error) => error.into(),
        _ => failure("failed"),
    }
}

/// What all parts agree on, the parts' names, and the words of all their captions.
fn metadata(parts: &[AdapterFile]) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::new();
    let agreed = |key: &&str| {
        let value = parts[0].metadata.get(*key)?;
        parts.iter().all(|part| part.metadata.get(*key) == Some(value)).then(|| ((*key).to_owned(), value.clone()))
    };
    metadata.extend(COMMON.iter().filter_map(agreed));
    let names = parts.iter().filter_map(|part| Some(part.path.file_stem()?.to_string_lossy().into_owned()));
    metadata.insert("modelspec.merged_from".into(), names.collect::<Vec<_>>().join(", "));
    let tags = parts.iter().filter_map(|part| part.metadata.get("ss_tag_frequency"));
    let tags: Map<String, Value> =
        tags.filter_map(|text| serde_json::from_str::<Map<_, _>>(text).ok()).flatten().collect();
    if !tags.is_empty() {
        metadata.insert("ss_tag_frequency".into(), Value::Object(tags).to_string());
    }
    metadata
}

fn report(args: &MixArgs, mixed: &[Mixed], seconds: f64, ui: &Ui) -> Result<(), Failure> {
    let energies: Vec<_> =
        mixed.iter().filter_map(|mixed| Some((mixed.module.component, &*mixed.module.path, mixed.energy?))).collect();
    if ui.json {
        let list: Vec<_> = mixed
            .iter()
            .map(|Mixed { module, energy }| {
                json!({"component": module.component.name(), "module": module.path, "rank": module.adapter.rank(),
                       "energy": energy})
            })
            .collect();
        let document =
            json!({"out": args.out.to_string_lossy(), "parts": args.lora, "modules": list, "seconds": seconds});
        return ui.json_data(&document).map_err(output);
    }
    let widths: Vec<usize> = mixed.iter().filter_map(|mixed| mixed.module.adapter.rank()).collect();
    let differences = mixed.iter().filter(|mixed| matches!(mixed.module.adapter, AnyAdapter::Full(_))).count();
    let mut lines = vec![format!(
        "Mixed      {} into {}, {}, in {}",
        text::plural(args.lora.len() as u64, "adapter"),
        text::plural(mixed.len() as u64, "module"),
        ranks(widths.iter().copied()),
        text::duration(seconds)
    )];
    if differences > 0 {
        lines.push(format!("Added      {} without a rank", text::plural(differences as u64, "difference")));
    }
    lines.extend(energy_lines(&energies));
    lines.push(file_line(&args.out));
    ui.data(&lines.join("\n")).map_err(output)?;
    if args.method == Mixing::Linear {
        ui.say("linear adds factors, not updates: cross terms make it differ from the sum, which `--method concat` is");
    }
    Ok(())
}
