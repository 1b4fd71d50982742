//! `lora extract`: what training changed, as an adapter.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use lora_core::{
    extract::{ExtractError, Extracted, Extraction, extract},
    format::{BaseModel, Dialect, Family, write_adapter},
    resize::{Cut, Search},
};
use serde_json::json;

use super::{
    adapters::{NAMED, energy_lines, file_line, percent, ranks},
    locate, output,
    resize::cut,
    spare,
};
use crate::{
    Failure,
    args::ExtractArgs,
    failure::{printable, shell_word},
    text,
    ui::Ui,
};

/// How often a line is said where no bar can be drawn.
const PAUSE: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &ExtractArgs, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    let linear = cut(args.rank, args.energy)?;
    let kernels = Cut { rank: args.conv_rank.or(args.rank), ..linear };
    let search = if args.exact { Search::Whole } else { Search::Randomised };
    let [base, tuned] = [locate(&args.base)?, locate(&args.tuned)?];
    spare(&args.out, [&*base, &*tuned])?;
    let (base, tuned) = (BaseModel::open(&base)?, BaseModel::open(&tuned)?);
    let progress = Progress::new(ui);
    let extracted = extract(&base, &tuned, Extraction { linear, kernels, search }, &|done, all| progress.at(done, all));
    progress.done();
    let extracted = extracted.map_err(|error| refused(args, error))?;
    for component in &extracted.missing {
        let has = if base.has(*component) { "the base" } else { "the tuned model" };
        ui.warn(&format!("{has} alone has a {component}; it is left out"));
    }
    if extracted.modules.is_empty() {
        let failure = Failure::new("nothing_changed", "no linear layer or convolution differs between the two models");
        let failure = left_out(&extracted).into_iter().fold(failure, Failure::detail);
        return Err(failure.hint("`--base` is the model before training, `--tuned` the one after"));
    }
    let dialect = args.format.map(Dialect::from).unwrap_or(match base.family() {
        Family::Language(_) | Family::Transformers(_) => Dialect::Peft,
        _ => Dialect::Kohya,
    });
    let modules: Vec<_> = extracted.modules.iter().map(|extracted| extracted.module.clone()).collect();
    let metadata = [("ss_training_comment".to_owned(), "extracted as the difference of two models".to_owned())];
    let metadata = if dialect == Dialect::Kohya { metadata.into() } else { Default::default() };
    write_adapter(&args.out, dialect, base.family(), &modules, &metadata, args.dtype.map(Into::into))?;
    report(args, &extracted, &base, start.elapsed().as_secs_f64(), ui)
}

fn refused(args: &ExtractArgs, error: ExtractError) -> Failure {
    let [base, tuned] = [&args.base, &args.tuned].map(|path| shell_word(&path.display().to_string()));
    let failure = |code| Failure::new(code, error.to_string());
    match error {
        ExtractError::Families { .. } | ExtractError::Shapes { .. } | ExtractError::Missing { .. } => {
            failure("models_differ").hint(format!("compare `lora inspect {base}` and `lora inspect {tuned}`"))
        }
        ExtractError::NotFinite { .. } | ExtractError::Indecomposable { .. } => {
            failure("not_finite").hint("one of the two is broken: fetch a fresh copy")
        }
        ExtractError::Other(error) => error.into(),
        _ => failure("failed"),
    }
}

fn report(args: &ExtractArgs, extracted: &Extracted, base: &BaseModel, seconds: f64, ui: &Ui) -> Result<(), Failure> {
    let modules = &extracted.modules;
    let energies: Vec<_> =
        modules.iter().map(|found| (found.module.component, &*found.module.path, found.energy)).collect();
    if ui.json {
        let list: Vec<_> = modules
            .iter()
            .map(|found| {
                json!({"component": found.module.component.name(), "module": found.module.path,
                       "rank": found.module.adapter.rank(), "energy": found.energy, "relative": found.relative})
            })
            .collect();
        let left: Vec<_> = extracted
            .left_out
            .iter()
            .map(|left| json!({"component": left.component.name(), "tensor": left.tensor, "relative": left.relative}))
            .collect();
        let missing: Vec<_> = extracted.missing.iter().map(|component| component.name()).collect();
        let document = json!({"out": args.out.to_string_lossy(), "base": base.family().to_string(), "modules": list,
            "unchanged": extracted.unchanged, "left_out": left, "missing": missing, "seconds": seconds});
        return ui.json_data(&document).map_err(output);
    }
    let widths = modules.iter().filter_map(|found| found.module.adapter.rank());
    let mut lines = vec![format!(
        "Extracted  {} of {}, {}, in {}",
        text::plural(modules.len() as u64, "module"),
        base.family(),
        ranks(widths),
        text::duration(seconds)
    )];
    if extracted.unchanged > 0 {
        lines.push(format!("Unchanged  {}: skipped", text::plural(extracted.unchanged as u64, "module")));
    }
    lines.extend(energy_lines(&energies));
    lines.extend(left_out(extracted));
    lines.push(file_line(&args.out));
    ui.data(&lines.join("\n")).map_err(output)
}

/// What changed and has no place in a low-rank file.
fn left_out(extracted: &Extracted) -> Vec<String> {
    let left = &extracted.left_out;
    if left.is_empty() {
        return Vec::new();
    }
    let count = text::plural(left.len() as u64, "tensor");
    let mut lines = vec![format!("Left out   {count} that changed and that no low-rank file can hold")];
    lines.extend(left.iter().take(NAMED).map(|left| {
        let name = printable(&left.component.with(&left.tensor));
        format!("           {name} (by {})", percent(left.relative))
    }));
    if left.len() > NAMED {
        lines.push(format!("           and {} more: --json names them all", left.len() - NAMED));
    }
    lines
}

/// How far it is: a bar, or a line now and then; heard from any thread.
struct Progress<'a> {
    bar: Option<ProgressBar>,
    last: Mutex<Instant>,
    ui: &'a Ui,
}

impl<'a> Progress<'a> {
    fn new(ui: &'a Ui) -> Self {
        let bar = ui.bars.then(|| {
            let style = ProgressStyle::with_template(" {pos}/{len} tensors {bar:20}  ETA {eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, last: Mutex::new(Instant::now()), ui }
    }

    fn at(&self, done: usize, all: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        } else if let Ok(mut last) = self.last.try_lock()
            && last.elapsed() >= PAUSE
        {
            *last = Instant::now();
            self.ui.say(&format!("{} of {} tensors", text::thousands(done as u64), text::thousands(all as u64)));
        }
    }

    fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
