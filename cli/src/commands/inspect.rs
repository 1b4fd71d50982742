//! `lora inspect`: what a file is, on one screen.

use lora_core::format::{AdapterFile, BaseModel, Component};

use crate::{
    Failure,
    args::InspectArgs,
    commands::{
        adapters::{key_name, percent},
        locate, output,
    },
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
            let read = AdapterFile::read(&inspection.path, &model)?;
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
        lines.extend(module_lines(&inspection.module_list));
    }
    ui.data(&lines.join("\n")).map_err(output)?;
    if let Some(family) = inspection.base.as_ref().filter(|_| inspection.is_foreign) {
        ui.say(&format!("adapters of {family} can be looked at and not applied"));
    } else if inspection.kind == Kind::Adapter && args.base.is_none() {
        let file = shell_word(&as_argument(&inspection.path));
        ui.say(&format!("whether every key fits a base: lora check {file} --base BASE"));
    }
    Ok(())
}

/// Family, rank and name of every module; columns no wider than they must be, since names are long.
fn module_lines(modules: &[(String, Option<usize>, &str)]) -> Vec<String> {
    let rank = |rank: &Option<usize>| rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string());
    let widest = |widths: &mut dyn Iterator<Item = usize>| widths.max().unwrap_or(0);
    let methods = widest(&mut modules.iter().map(|(_, _, method)| method.len()));
    let ranks = widest(&mut modules.iter().map(|(_, of, _)| rank(of).len()));
    let line = |(module, of, method): &(String, Option<usize>, &str)| {
        format!("{method:<methods$} {:>ranks$}  {}", rank(of), printable(module))
    };
    modules.iter().map(line).collect()
}

fn rows(inspection: &Inspection, matched: Option<(usize, usize)>, paint: Paint) -> Vec<String> {
    let mut rows: Vec<(&str, String)> = vec![("File", printable(&inspection.path.display().to_string()))];
    rows.push(("What", what(inspection)));
    if inspection.kind == Kind::Adapter && inspection.base.is_none() {
        rows.push(("Base", "unknown: its keys follow no naming that is known here".into()));
    }
    if let Some(base) = inspection.base.as_ref().filter(|_| inspection.kind == Kind::Adapter || inspection.is_foreign) {
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
        let real = |span: Span<f64>| spanned(Span { min: text::real(span.min), max: text::real(span.max) });
        let alphas = match (inspection.alphas, inspection.scales) {
            (Some(alphas), Some(scales)) if inspection.is_stabilised => {
                format!("alpha {}, scale {} (rsLoRA: alpha/√rank)", real(alphas), real(scales))
            }
            (Some(alphas), _) => format!("alpha {}", real(alphas)),
            (None, Some(_)) => "no alphas in the file: scale 1".to_owned(),
            (None, None) => "scale unknown".to_owned(),
        };
        let ranks = spanned(Span { min: ranks.min.to_string(), max: ranks.max.to_string() });
        rows.push(("Rank", format!("{ranks}, {alphas}")));
    }
    rows.push((
        "Size",
        format!(
            "{}, {}, {} {}, {}",
            text::bytes(inspection.bytes),
            text::plural(inspection.tensors as u64, "tensor"),
            text::count(inspection.parameters),
            if inspection.parameters == 1 { "parameter" } else { "parameters" },
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
    rows.extend(inspection.warnings.iter().map(|warning| ("Warning", printable(warning))));
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
        Kind::Base => {
            let family = inspection.base.as_deref().unwrap_or("of unknown family");
            match component(inspection) {
                Some(component) => format!("component of a base model: {component} of {family}"),
                None => format!("base model, {family}"),
            }
        }
        Kind::Embedding => "textual inversion: an embedding, no adapter".into(),
        Kind::Unknown if inspection.tensors == 0 => "a container without tensors".into(),
        Kind::Unknown if inspection.is_foreign => "tensors in a spelling that is not known here".into(),
        Kind::Unknown => "tensors that are neither an adapter nor a base model that is known here".into(),
    }
}

/// The one component that a base is, where it is no more than that.
fn component(inspection: &Inspection) -> Option<&'static str> {
    let mut names = inspection.components.keys();
    let only = names.next().filter(|_| names.next().is_none())?;
    Some(match Component::from_name(only)? {
        Component::Unet => "the UNet",
        Component::TextEncoder => "the text encoder",
        Component::TextEncoder2 => "the second text encoder",
        Component::Vae => "the VAE",
        Component::LanguageModel => return None,
    })
}

fn method_name(method: &str) -> &str {
    match method {
        "lora" => "LoRA",
        "rslora" => "rsLoRA",
        "dora" => "DoRA",
        "loha" => "LoHa",
        "lokr" => "LoKr",
        "glora" => "GLoRA",
        "oft" => "OFT",
        "boft" => "BOFT",
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
    text::ellipsis(&key_name(text), 140)
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
