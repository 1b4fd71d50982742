//! The page itself: sections in the order in which a person asks.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Content, chart::Chart, embedded, word};
use crate::{
    options::values::Format,
    plan::Plan,
    run::{Metric, Metrics, Sample, SampleSet, Validation},
    text,
    usage::uses,
};

/// The whole page.
pub(super) fn render(content: &Content) -> String {
    let name = word(&content.summary.config, "name");
    let name = if name.is_empty() { "adapter" } else { name };
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{} · lora</title>\n\
         <style>\n{}</style>\n</head>\n<body>\n<main>\n",
        escape(name),
        include_str!("page.css")
    );
    head(&mut html, content, name);
    before_and_after(&mut html, &content.sets);
    over_steps(&mut html, &content.sets, content.left_out);
    curves(&mut html, &content.metrics);
    how_to_use(&mut html, content);
    if let Some(plan) = &content.plan {
        planned(&mut html, plan);
    }
    options(&mut html, content);
    let _ = write!(
        html,
        "<footer>lora {} · this page is one file and asks for nothing from the network</footer>\n</main>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    );
    html
}

fn head(html: &mut String, content: &Content, name: &str) {
    let summary = &content.summary;
    let _ = write!(
        html,
        "<header>\n<h1>{}<span class=\"state {}\">{}</span></h1>\n",
        escape(name),
        summary.state,
        summary.state
    );
    if let Some(plan) = &content.plan {
        let _ = writeln!(
            html,
            "<p class=\"soft\">{} on {}, learnt from {} with {}</p>",
            escape(&plan.adapter),
            escape(&plan.base_kind),
            text::plural(plan.data.used, &escape(&plan.data.unit)),
            escape(&plan.recipe)
        );
    }
    let mut facts = vec![(
        "Steps",
        summary.steps.map_or_else(
            || text::thousands(summary.step),
            |steps| format!("{} of {}", text::thousands(summary.step), text::thousands(steps)),
        ),
    )];
    facts.push(("Training time", text::duration(summary.seconds)));
    let finite: Vec<_> =
        content.metrics.steps.iter().map(|metric| metric.loss).filter(|loss| loss.is_finite()).collect();
    if !finite.is_empty() {
        let part = finite.len().div_ceil(10);
        let mean = |values: &[f64]| text::digits(values.iter().sum::<f64>() / values.len() as f64, 3);
        facts.push((
            "Loss, first to last tenth",
            format!("{} → {}", mean(&finite[..part]), mean(&finite[finite.len() - part..])),
        ));
    }
    if let [first, .., last] = content.metrics.validation.as_slice() {
        let shown = |measured: &Validation| text::digits(measured.validation_loss, 3);
        facts.push(("Validation loss, first to last", format!("{} → {}", shown(first), shown(last))));
    }
    if let Some(plan) = &content.plan {
        facts.push(("Learnt numbers", text::count(plan.trainable_parameters)));
    }
    if let Some(bytes) = summary.adapter.as_ref().and_then(|path| std::fs::metadata(path).ok()).map(|meta| meta.len()) {
        facts.push(("File", text::bytes(bytes)));
    }
    html.push_str("<dl class=\"facts\">\n");
    for (label, value) in facts {
        let _ = writeln!(html, "<div><dt>{label}</dt><dd>{}</dd></div>", escape(&value));
    }
    html.push_str("</dl>\n</header>\n");
}

/// The same prompts and seeds without and with the adapter.
fn before_and_after(html: &mut String, sets: &[SampleSet]) {
    let [first, .., last] = sets else { return };
    if first.step != 0 {
        return;
    }
    html.push_str("<h2>Before and after</h2>\n<p class=\"note\">The same prompt and seed, by the base alone and with the adapter.</p>\n<div class=\"pairs\">\n");
    for after in &last.samples {
        let same =
            |sample: &&Sample| (&sample.prompt, sample.seed, &sample.file) == (&after.prompt, after.seed, &after.file);
        let Some(before) = first.samples.iter().find(same) else { continue };
        let _ = write!(
            html,
            "<figure>\n<div class=\"pair\"><div><span>before</span>{}</div><div><span>after {} steps</span>{}</div></div>\n\
             <figcaption>{}</figcaption>\n</figure>\n",
            shown(first, before, "before"),
            text::thousands(last.step),
            shown(last, after, "after"),
            caption(after)
        );
    }
    html.push_str("</div>\n");
}

/// One row a prompt, one column a step.
fn over_steps(html: &mut String, sets: &[SampleSet], left_out: usize) {
    let Some(last) = sets.last() else { return };
    html.push_str(
        "<h2>Samples over steps</h2>\n<div class=\"scroll\"><table class=\"grid-of-samples\">\n<tr><th>Prompt</th>",
    );
    for set in sets {
        let label = if set.step == 0 { "base".to_owned() } else { format!("step {}", text::thousands(set.step)) };
        let _ = write!(html, "<th>{label}</th>");
    }
    html.push_str("</tr>\n");
    for sample in &last.samples {
        let _ = write!(html, "<tr><td>{}</td>", caption(sample));
        for set in sets {
            let same = set.samples.iter().find(|other| other.file == sample.file);
            let cell = same.map(|same| shown(set, same, &format!("step {}", set.step))).unwrap_or_default();
            let _ = write!(html, "<td>{cell}</td>");
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
    if left_out > 0 {
        let _ = writeln!(
            html,
            "<p class=\"note\">{} left out to keep the page small; the folder <code>samples</code> has them all.</p>",
            text::plural(left_out as u64, "step")
        );
    }
}

fn curves(html: &mut String, Metrics { steps: metrics, validation }: &Metrics) {
    if metrics.is_empty() {
        return;
    }
    html.push_str("<h2>Training</h2>\n");
    let of = |value: fn(&Metric) -> f64| metrics.iter().map(|metric| (metric.step as f64, value(metric))).collect();
    let second = validation.iter().map(|measured| (measured.step as f64, measured.validation_loss)).collect();
    let charts = [
        Chart { title: "Loss", points: of(|metric| metric.loss), second, smooth: true, height: 300.0 },
        Chart {
            title: "Learning rate",
            points: of(|metric| metric.lr),
            second: Vec::new(),
            smooth: false,
            height: 120.0,
        },
        Chart {
            title: "Gradient norm",
            points: of(|metric| metric.grad_norm),
            second: Vec::new(),
            smooth: true,
            height: 160.0,
        },
    ];
    for chart in charts {
        let dots = if chart.second.is_empty() { "" } else { ", dotted: on examples kept apart" };
        let note = match chart.smooth {
            true => format!(" <span class=\"soft\">· thin: each step, bold: smoothed{dots}</span>"),
            false => String::new(),
        };
        let _ = writeln!(html, "<div class=\"card curve\"><h3>{}{note}</h3>{}</div>", chart.title, chart.svg());
    }
    let broken = metrics.iter().filter(|metric| !metric.loss.is_finite()).count();
    if broken > 0 {
        let _ = writeln!(html, "<p class=\"note\">{} without a finite loss.</p>", text::plural(broken as u64, "step"));
    }
}

fn how_to_use(html: &mut String, content: &Content) {
    let config = &content.summary.config;
    let Some(adapter) = &content.summary.adapter else { return };
    let trigger = word(config, "trigger");
    let prompt = content.sets.last().and_then(|set| set.samples.first()).map(|sample| sample.prompt.clone());
    let prompt =
        prompt.filter(|prompt| !prompt.is_empty()).unwrap_or_else(|| format!("{trigger} a house").trim().to_owned());
    let format =
        config.get("format").and_then(|format| serde_json::from_value(format.clone()).ok()).unwrap_or(Format::Kohya);
    html.push_str("<h2>How to use the file</h2>\n");
    let _ = writeln!(html, "<p><code>{}</code></p>", escape(&adapter.display().to_string()));
    html.push_str("<div class=\"uses\">\n");
    for usage in uses(adapter, word(config, "base"), &prompt, format) {
        let code = usage.code.map(|code| format!("<pre>{}</pre>", escape(&code))).unwrap_or_default();
        let _ = writeln!(
            html,
            "<div class=\"card\"><h3>{}</h3><p class=\"soft\">{}</p>{code}</div>",
            usage.program,
            escape(&usage.how)
        );
    }
    html.push_str("</div>\n");
}

fn planned(html: &mut String, plan: &Plan) {
    let data = &plan.data;
    let mut rows = vec![(
        "Data",
        format!("{} from {} ({})", text::plural(data.used, &data.unit), data.source.display(), data.layout),
    )];
    rows.extend(data.notes.iter().map(|note| ("", note.clone())));
    if !data.buckets.is_empty() {
        let list: Vec<_> =
            data.buckets.iter().map(|bucket| format!("{}×{}: {}", bucket.width, bucket.height, bucket.count)).collect();
        rows.push(("Buckets", list.join(" · ")));
    }
    rows.push(("Base", format!("{} ({})", plan.base, plan.base_kind)));
    rows.push(("Adapter", format!("{} on {}, {}", plan.adapter, plan.targets, text::plural(plan.modules, "module"))));
    let accum = if plan.accum > 1 { format!(" × accum {}", plan.accum) } else { String::new() };
    rows.push((
        "Length",
        format!("{}, batch {}{accum}, {:.1} epochs", text::plural(plan.steps, "step"), plan.batch, plan.epochs),
    ));
    rows.push(("Recipe", plan.recipe.clone()));
    rows.push(("Machine", plan.machine.clone()));
    rows.push(("Memory", format!("about {} planned", text::bytes(plan.memory_bytes.total))));
    rows.push(("Seed", plan.seed.to_string()));
    html.push_str("<h2>Plan</h2>\n");
    table(html, rows.into_iter().map(|(label, value)| (label.to_owned(), value)));
    if !data.skipped.is_empty() {
        let _ = write!(
            html,
            "<details><summary>{} not trained on</summary>",
            text::plural(data.skipped.len() as u64, "file")
        );
        table(html, data.skipped.iter().map(|skipped| (skipped.path.display().to_string(), skipped.reason.clone())));
        html.push_str("</details>\n");
    }
}

fn options(html: &mut String, content: &Content) {
    html.push_str("<details><summary>Every option of the run (config.toml)</summary>");
    let plain = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items
            .iter()
            .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(" · "),
        other => other.to_string(),
    };
    table(html, content.summary.config.iter().map(|(key, value)| (key.clone(), plain(value))));
    html.push_str("</details>\n");
}

fn table(html: &mut String, rows: impl Iterator<Item = (String, String)>) {
    html.push_str("<table class=\"rows\">\n");
    for (label, value) in rows {
        let _ = writeln!(html, "<tr><th>{}</th><td>{}</td></tr>", escape(&label), escape(&value));
    }
    html.push_str("</table>\n");
}

/// A sample as a picture, or as text.
fn shown(set: &SampleSet, sample: &Sample, what: &str) -> String {
    let path = set.folder.join(&sample.file);
    if sample.file.ends_with(".txt") {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        return format!("<pre>{}</pre>", escape(&text));
    }
    match embedded(&path) {
        Some(address) => format!("<img src=\"{address}\" alt=\"{}, {what}\" loading=\"lazy\">", escape(&sample.prompt)),
        None => format!("<p class=\"note\">{} cannot be read</p>", escape(&sample.file)),
    }
}

fn caption(sample: &Sample) -> String {
    match sample.prompt.is_empty() {
        true => escape(&sample.file),
        false => format!("{} <span class=\"soft\">· seed {}</span>", escape(&sample.prompt), sample.seed),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
