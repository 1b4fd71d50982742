//! `lora merge`: adapters into a base, file by file and tensor by tensor.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use lora_core::format::{AdapterStream, BaseModel, Merger, Strengths, remove_abandoned};
use serde_json::{Value, json};

use crate::{
    Failure,
    args::MergeArgs,
    commands::{
        adapters::{leave_embeddings, warning_lines},
        locate, output, spare,
    },
    disk,
    failure::{printable, shell_word},
    options::values::LoraFile,
    text,
    ui::Ui,
};

/// Keys that are named; the rest is counted.
const NAMED: usize = 8;

/// How often a line is said where no bar can be drawn.
const PAUSE: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &MergeArgs, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    let path = locate(&args.base)?;
    spare(&args.out, args.lora.iter().map(|lora| &*lora.path))?;
    let base = BaseModel::open(&path)?;
    let mut adapters = Vec::new();
    for lora in &args.lora {
        let stream = AdapterStream::open(&lora.path, &base)?;
        account(args, lora, &stream, &base, ui)?;
        adapters.push((stream, lora.strength.into()));
    }
    let merger = Merger::new(&base, &adapters, args.dtype.map(Into::into))?;
    remove_abandoned(&args.out);
    room_for(&args.out, merger.bytes())?;
    let mut progress = Progress::new(merger.bytes(), ui);
    let left_out = merger.write_model(&path, &args.out, &mut |bytes| progress.at(bytes))?;
    progress.done();
    for path in &left_out {
        ui.warn(&format!(
            "{} is left out: it holds the unmerged weights in another form",
            printable(&path.display().to_string())
        ));
    }
    let (changed, acted_on) = (merger.changed(), merger.acted_on());
    if changed == 0 {
        let reason = match acted_on {
            0 => "every strength or scale is 0",
            _ => "what the adapters add is zero, or too small for the numbers of the base",
        };
        ui.warn(&format!("no tensor has changed: {reason}"));
    } else if changed < acted_on {
        let same = text::plural((acted_on - changed) as u64, "tensor");
        ui.say(&format!(
            "{same} came out as they were: what is added is zero, or too small for the numbers of the base"
        ));
    }
    let seconds = start.elapsed().as_secs_f64();
    if ui.json {
        return ui.json_data(&document(args, &merger, &adapters, &left_out, seconds)).map_err(output);
    }
    let modules = adapters.iter().map(|(stream, _)| stream.modules()).sum::<usize>();
    ui.data(&format!(
        "Merged     {} of {} into {}\nChanged    {} of {}{}\nOutput     {} ({}, {})",
        text::plural(modules as u64, "module"),
        text::plural(adapters.len() as u64, "adapter"),
        base.family(),
        text::thousands(changed as u64),
        text::plural(merger.tensors() as u64, "tensor"),
        args.dtype.map_or(", the rest bit for bit as it was", |_| ""),
        printable(&args.out.display().to_string()),
        text::bytes(merger.bytes()),
        text::duration(seconds),
    ))
    .map_err(output)
}

/// Says what of an adapter is not applied; that is a failure unless the person asked for it.
fn account(
    args: &MergeArgs,
    lora: &LoraFile,
    stream: &AdapterStream,
    base: &BaseModel,
    ui: &Ui,
) -> Result<(), Failure> {
    let read = stream.summary();
    let name = lora.path.display().to_string();
    for warning in warning_lines(read.warnings.iter()) {
        ui.warn(&format!("{}: {warning}", printable(&name)));
    }
    leave_embeddings(&name, &read.embeddings, ui);
    if read.applied() == 0 {
        return Err(Failure::new(
            "nothing_to_merge",
            format!("{name} holds no adapter for this base ({})", base.family()),
        )
        .hint(format!("what it is: `lora inspect {}`", shell_word(&name)))
        .with("path", name));
    }
    if read.unapplied.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        read.unapplied.iter().map(|(key, reason)| format!("{}: {reason}", printable(key))).collect();
    let message = format!("{} of {} keys of {name} find no place in this base", lines.len(), read.keys);
    if args.allow_unmatched {
        ui.warn(&printable(&message));
        lines.iter().for_each(|line| ui.say(&format!("  {line}")));
        return Ok(());
    }
    let mut failure = Failure::new("unmatched_keys", message);
    failure = lines.iter().take(NAMED).fold(failure, Failure::detail);
    if lines.len() > NAMED {
        failure = failure.detail(format!("and {} more", lines.len() - NAMED));
    }
    let check = format!("lora check {} --base {}", shell_word(&name), shell_word(&args.base.display().to_string()));
    Err(failure
        .hint(format!("`{check}` names them all; `--allow-unmatched` merges the rest"))
        .with("path", name)
        .with("unapplied", unapplied(stream)))
}

fn unapplied(stream: &AdapterStream) -> Value {
    let keys = stream.summary().unapplied.iter();
    keys.map(|(key, reason)| json!({"key": key, "reason": reason.to_string()})).collect()
}

fn document(
    args: &MergeArgs,
    merger: &Merger<'_>,
    adapters: &[(AdapterStream, Strengths)],
    left_out: &[PathBuf],
    seconds: f64,
) -> Value {
    let adapters = args.lora.iter().zip(adapters).map(|(lora, (stream, _))| {
        let read = stream.summary();
        json!({
            "path": lora.path.to_string_lossy(),
            "strength": {
                "unet": lora.strength.unet,
                "te1": lora.strength.text_encoder,
                "te2": lora.strength.text_encoder_2,
            },
            "dialect": read.dialect.to_string(),
            "modules": stream.modules(),
            "applied": read.applied(),
            "total": read.keys,
            "unapplied": unapplied(stream),
            "embeddings": read.embeddings,
            "warnings": read.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    });
    json!({
        "out": args.out.to_string_lossy(),
        "base": merger.base().family().to_string(),
        "adapters": adapters.collect::<Vec<_>>(),
        "tensors": {"changed": merger.changed(), "total": merger.tensors()},
        "bytes": merger.bytes(),
        "left_out": left_out.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>(),
        "seconds": seconds,
    })
}

/// Refuses what cannot fit before anything is written.
fn room_for(out: &Path, bytes: u64) -> Result<(), Failure> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match disk::free_bytes(folder) {
        Ok(free) if free < bytes => Err(Failure::new("disk_full", format!("not enough room for {}", out.display()))
            .detail(format!("{} are needed, {} are free", text::bytes(bytes), text::bytes(free)))
            .hint("free some space, or choose another disk with `--out`")
            .with("needed", bytes)
            .with("free", free)),
        // A disk that cannot be asked says so when it is written to.
        _ => Ok(()),
    }
}

/// How far it is: a bar, or a line now and then.
struct Progress<'a> {
    bar: Option<ProgressBar>,
    total: u64,
    last: Instant,
    ui: &'a Ui,
}

impl<'a> Progress<'a> {
    fn new(total: u64, ui: &'a Ui) -> Self {
        let bar = ui.bars.then(|| {
            let style = ProgressStyle::with_template(" {bytes}/{total_bytes} {bar:20}  {bytes_per_sec}  ETA {eta}");
            ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, total, last: Instant::now(), ui }
    }

    fn at(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        } else if self.last.elapsed() >= PAUSE {
            self.last = Instant::now();
            self.ui.say(&format!("{} of {} written", text::bytes(bytes), text::bytes(self.total)));
        }
    }

    fn done(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
