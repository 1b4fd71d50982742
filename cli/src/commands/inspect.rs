//! `lora inspect`: what a file is, on one screen.

use lora_core::format::{AdapterFile, BaseModel};

use crate::{
    Failure,
    args::InspectArgs,
    commands::{adapters::percent, locate, output},
    failure::{as_argument, printable, shell_word},
    inspection::{Inspection, Kind, Span, Strength, inspect},
    text,
    ui::{Paint, Ui},
};

/// Unknown keys that are named.
const NAMED: usize = 5;

pub(crate) fn run(args: &InspectArgs, ui: &Ui) -> Result<(), Failure> {
    let mut inspection = inspect(&args.file)?;
    let mut matched = None;
    if let Some(base) = &args.base {
        let model = BaseModel::open(&locate(base)?)?;
        inspection.base = Some(model.family().to_string());
        if inspection.kind == Kind::Adapter {
            let read = AdapterFile::read(&args.file, &model)?;
            inspection.unknown_keys = read.unapplied.iter().map(|(key, _)| key.clone()).collect();
            matched = Some((read.applied(), read.keys));
        }
    }
    if ui.json {
        let mut document = serde_json::to_value(&inspection).map_err(|error| Failure::from_error("output", &error))?;
        if args.modules {
            document["module_list"] = serde_json::json!(inspection.module_list);
        }
        return ui.json_data(&document).map_err(output);
    }
    let mut lines = rows(&inspection, matched, ui.stdout());
    if args.modules {
        lines.push(String::new());
        lines.extend(inspection.module_list.iter().map(|(module, rank, method)| {
            let rank = rank.map_or_else(|| "-".into(), |rank| rank.to_string());
            format!("{method:<6} {rank:>5}  {}", printable(module))
        }));
    }
    ui.data(&lines.join("\n")).map_err(output)?;
    if let Some(family) = inspection.base.as_ref().filter(|_| inspection.is_foreign) {
        ui.say(&format!("adapters of {family} can be looked at and not applied"));
    } else if inspection.kind == Kind::Adapter && args.base.is_none() {
        let file = shell_word(&as_argument(&args.file));
        ui.say(&format!("whether every key fits a base: lora check {file} --base BASE"));
    }
    Ok(())
}

fn rows(inspection: &Inspection, matched: Option<(usize, usize)>, paint: Paint) -> Vec<String> {
    let mut rows: Vec<(&str, String)> = vec![("File", printable(&inspection.path.display().to_string()))];
    rows.push(("What", what(inspection)));
    if inspection.kind == Kind::Adapter && inspection.base.is_none() {
        rows.push(("Base", "unknown: its keys follow no naming that is known here".into()));
    }
    if let Some(base) = inspection.base.as_ref().filter(|_| inspection.kind == Kind::Adapter) {
        let fits = matched.map_or_else(
            || " (judged by its keys)".into(),
            |(applied, all)| format!(" ({applied} of {all} keys applied)"),
        );
        rows.push(("Base", format!("{base}{fits}")));
    }
    let components =
        inspection.components.iter().map(|(name, count)| format!("{name} {}", text::thousands(*count as u64)));
    let components = components.collect::<Vec<_>>().join(", ");
    if inspection.modules > 0 {
        let parts = if components.is_empty() { String::new() } else { format!(" ({components})") };
        rows.push(("Modules", format!("{}{parts}", text::thousands(inspection.modules as u64))));
    }
    if let Some(ranks) = inspection.ranks {
        let alphas = inspection.alphas.map_or_else(
            || "no alphas in the file: scale 1".to_owned(),
            |alphas| format!("alpha {}", spanned(Span { min: text::real(alphas.min), max: text::real(alphas.max) })),
        );
        let ranks = spanned(Span { min: ranks.min.to_string(), max: ranks.max.to_string() });
        rows.push(("Rank", format!("{ranks}, {alphas}")));
    }
    rows.push((
        "Size",
        format!(
            "{}, {}, {} parameters, {}",
            text::bytes(inspection.bytes),
            text::plural(inspection.tensors as u64, "tensor"),
            text::count(inspection.parameters),
            inspection.dtypes.join(" and ")
        )
        .trim_end_matches(", ")
        .to_owned(),
    ));
    if let Some(strength) = &inspection.strength {
        let how = strong(strength);
        if !how.is_empty() {
            rows.push(("Strength", how));
        }
        if !strength.not_finite.is_empty() {
            let keys: Vec<_> = strength.not_finite.iter().take(NAMED).map(|key| short(key)).collect();
            let count = text::plural(strength.not_finite.len() as u64, "tensor");
            rows.push(("Broken", format!("{count} with NaN or infinity: {}", keys.join(", "))));
        }
        if !strength.broken.is_empty() {
            let names: Vec<_> = strength.broken.iter().take(NAMED).map(|name| short(name)).collect();
            let count = text::plural(strength.broken.len() as u64, "module");
            rows.push(("Broken", format!("{count} whose tensors make no adapter: {}", names.join(", "))));
        }
    }
    if inspection.kind == Kind::Adapter && inspection.strength.is_none() {
        rows.push(("Strength", "not measured: the file alone does not tell".into()));
    }
    rows.extend(trained(inspection));
    if inspection.kind == Kind::Adapter && inspection.embeddings > 0 {
        let count = text::plural(inspection.embeddings as u64, "tensor");
        rows.push(("Bundled", format!("{count} of textual inversions, which are no adapters")));
    }
    if !inspection.unknown_keys.is_empty() {
        let named: Vec<_> = inspection.unknown_keys.iter().take(NAMED).map(|key| short(key)).collect();
        let more = inspection.unknown_keys.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let label = if matched.is_some() { "Unapplied" } else { "Unknown" };
        rows.push((
            label,
            format!("{}: {}{more}", text::plural(inspection.unknown_keys.len() as u64, "key"), named.join(", ")),
        ));
    }
    if !inspection.metadata.is_empty() {
        rows.push((
            "Metadata",
            format!(
                "{} (--json shows them)",
                text::plural(inspection.metadata.len() as u64, "entry").replace("entrys", "entries")
            ),
        ));
    }
    let mut lines = Vec::new();
    for (label, value) in rows {
        for (index, line) in text::wrap(&value, 69).into_iter().enumerate() {
            let label = if index == 0 { label } else { "" };
            lines.push(format!("{} {line}", paint.bold(&format!("{label:<10}"))));
        }
    }
    lines
}

/// How large the updates are, in norms where they are fixed matrices and in shares where they multiply the weight.
fn strong(strength: &Strength) -> String {
    let mut parts = Vec::new();
    if strength.measured > 0 {
        parts.push(format!(
            "‖ΔW‖ {} on average, {} at most ({})",
            text::real(strength.mean_norm),
            text::real(strength.largest_norm),
            short(&strength.largest_module)
        ));
    }
    if let Some(turned) = &strength.turned {
        parts.push(format!(
            "turns weights by {} of their norm on average, {} at most ({})",
            percent(turned.mean_share),
            percent(turned.largest_share),
            short(&turned.largest_module)
        ));
    }
    if strength.unmeasured > 0 && (parts.is_empty() || strength.unmeasured > strength.measured) {
        let count = text::plural(strength.unmeasured as u64, "module");
        parts.push(format!("{count} not measured: the base has a say in it, or it would take long"));
    }
    parts.join("; ")
}

fn what(inspection: &Inspection) -> String {
    match inspection.kind {
        Kind::Adapter => {
            let method = inspection.method.as_deref().unwrap_or("unknown");
            let words: Vec<_> = method.split('+').map(method_name).collect();
            format!("adapter, {}, {} spelling", listed(&words), inspection.dialect.as_deref().unwrap_or("unknown"))
        }
        Kind::Base => format!("base model, {}", inspection.base.as_deref().unwrap_or("of unknown family")),
        Kind::Embedding => "textual inversion: an embedding, no adapter".into(),
        Kind::Unknown if inspection.tensors == 0 => "a container without tensors".into(),
        Kind::Unknown => "tensors that are neither an adapter nor a base model that is known here".into(),
    }
}

fn method_name(method: &str) -> &str {
    match method {
        "lora" => "LoRA",
        "dora" => "DoRA",
        "loha" => "LoHa",
        "lokr" => "LoKr",
        "glora" => "GLoRA",
        "oft" => "OFT",
        "ia3" => "(IA)³",
        _ => "full differences",
    }
}

fn trained(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let training = &inspection.training;
    let mut rows = Vec::new();
    rows.extend(training.title.iter().map(|title| ("Title", short(title))));
    let mut facts = Vec::new();
    facts.extend(training.base_model.iter().map(|base| format!("on {}", printable(base))));
    facts.extend(training.examples.map(|count| format!("with {} examples", text::thousands(count))));
    facts.extend(training.steps.map(|steps| text::plural(steps, "step")));
    facts.extend(training.epochs.map(|epochs| text::plural(epochs, "epoch")));
    facts.extend(training.lr.map(|lr| format!("lr {}", text::real(lr))));
    facts.extend(training.optimizer.iter().map(|name| printable(name)));
    facts.extend(training.resolution.iter().map(|size| format!("at {}", printable(size))));
    facts.extend(training.program.iter().map(|program| format!("by {}", printable(program))));
    if !facts.is_empty() {
        rows.push(("Trained", facts.join(", ")));
    } else if inspection.kind == Kind::Adapter {
        rows.push(("Trained", "the file does not say".into()));
    }
    if !training.trigger_words.is_empty() {
        let words: Vec<_> = training.trigger_words.iter().map(|word| short(word)).collect();
        rows.push(("Trigger", words.join(", ")));
    } else if inspection.kind == Kind::Adapter && inspection.base.as_deref() != Some("a language model") {
        rows.push(("Trigger", "none that the file names".into()));
    }
    if !training.tags.is_empty() {
        let tags: Vec<_> = training.tags.iter().map(|(tag, count)| format!("{} {count}", short(tag))).collect();
        rows.push(("Captions", tags.join(", ")));
    }
    rows
}

/// A text out of a file, safe for a terminal and no longer than two lines of it.
fn short(text: &str) -> String {
    text::ellipsis(&printable(text), 140)
}

/// `a`, `a and b`, `a, b and c`.
fn listed(words: &[&str]) -> String {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

fn spanned(span: Span<String>) -> String {
    if span.min == span.max { span.min } else { format!("{} to {}", span.min, span.max) }
}
