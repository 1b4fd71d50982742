//! `lora pull`: a model from the Hugging Face hub into the cache, the one command that opens a network connection.

mod failure;

use std::path::Path;

use lora_core::hub;
use lora_hub::{Event, Hub, Plan, Planned, Settings, Wanted, offline_by};
use serde_json::{Value, json};

use crate::{
    Failure,
    args::{Global, PullArgs},
    commands::output,
    disk,
    failure::{printable, shell_word},
    progress::Download,
    signals, text,
    ui::Ui,
};

/// Bytes that are left free beside a model.
const SPARE: u64 = 64 << 20;

pub(crate) fn run(args: &PullArgs, global: &Global, ui: &Ui) -> Result<(), Failure> {
    let offline = if global.offline { Some("--offline") } else { offline_by() };
    if let Some(by) = offline {
        return from_cache(args, by, ui);
    }
    let mut settings = Settings::from_env().map_err(failure::of)?;
    settings.retries = args.retries;
    let hub = Hub::new(settings).map_err(failure::of)?;
    let wanted = Wanted { files: args.files.clone(), variant: args.variant.clone() };
    let mut talk = |event: Event<'_>| {
        if let Event::Retry { what, reason, wait } = event {
            ui.say(&retry(what, reason, wait.as_secs_f64()));
        }
    };
    let plan = match hub.plan(&args.name.0, &wanted, &mut talk) {
        Ok(plan) => plan,
        Err(error) if error.is_network() => return unreachable(args, &error, ui),
        Err(error) => return Err(failure::of(error)),
    };
    if args.dry_run {
        return say_plan(&plan, ui);
    }
    check_disk(&plan)?;
    let resumed: u64 = plan.files.iter().filter(|file| !file.is_there).map(|file| file.half).sum();
    if plan.files.iter().any(|file| !file.is_there) {
        let from = if resumed == 0 { String::new() } else { format!(" of {}", text::bytes(plan.missing() + resumed)) };
        ui.say(&format!("fetching {}: {}{from}", plan.name, text::bytes(plan.missing())));
    }
    let interrupted = Failure::new("interrupted", "interrupted: what has come is kept")
        .hint(format!("`lora pull {}` goes on from there", shell_words(args)));
    signals::listen(|_| interrupted, ui)?;
    let mut download = Download::new(*ui, plan.missing() + resumed);
    let fetched = hub.fetch(&plan, &mut |event| match event {
        Event::File { file, have } => download.file(&file.name, have),
        Event::Bytes { count } => download.advance(count),
        Event::Back { bytes } => download.back(bytes),
        Event::Waiting { file } => download.note(&format!("{}: another program fetches it, waiting", file.name)),
        Event::Retry { what, reason, wait } => download.note(&retry(what, reason, wait.as_secs_f64())),
        _ => {}
    });
    drop(download);
    let fetched = fetched.map_err(failure::of)?;
    if fetched.bytes == 0 {
        ui.say(&format!("{}: the cache has it all, nothing was fetched", plan.name));
    }
    say_place(&plan, &fetched.path, fetched.bytes, ui)
}

/// The words behind `lora pull`, to be typed again.
fn shell_words(args: &PullArgs) -> String {
    let variant = args.variant.iter().flat_map(|variant| ["--variant".to_owned(), shell_word(variant)]);
    let words = [args.name.0.to_string()].into_iter().chain(args.files.iter().map(|file| shell_word(file)));
    words.chain(variant).collect::<Vec<_>>().join(" ")
}

fn retry(what: &str, reason: &str, seconds: f64) -> String {
    format!("{}: {}; trying again in {}", printable(what), printable(reason), text::duration(seconds))
}

/// What the cache has, where there is no network.
fn from_cache(args: &PullArgs, by: &str, ui: &Ui) -> Result<(), Failure> {
    let name = &args.name.0;
    let refused = |missing: String| {
        Failure::new("offline", format!("{missing}, and {by} forbids the network"))
            .hint(match by {
                "--offline" => format!("with a network: `lora pull {}`", shell_words(args)),
                by => format!("with a network: `env -u {by} lora pull {}`", shell_words(args)),
            })
            .with("offline_by", by)
    };
    let path = hub::cache().and_then(|cache| name.find(&cache)).map_err(|error| refused(error.to_string()))?;
    if let Some(missing) = args.files.iter().find(|file| !path.join(file).is_file()) {
        return Err(refused(format!("{name}: `{missing}` is not in the cache {}", path.display())));
    }
    ui.say(&format!("{name}: no network ({by}); this is what the cache has"));
    say_cached(args, &path, ui)
}

/// What the cache has, where nobody answers.
fn unreachable(args: &PullArgs, error: &lora_hub::Error, ui: &Ui) -> Result<(), Failure> {
    let found = hub::cache().and_then(|cache| args.name.0.find(&cache)).ok();
    match found.filter(|path| args.files.iter().all(|file| path.join(file).is_file())) {
        Some(path) if !args.dry_run => {
            ui.warn(&format!("{}; the copy in the cache is used, which may be older", printable(&error.to_string())));
            say_cached(args, &path, ui)
        }
        _ => Err(failure::unreachable(error)),
    }
}

fn say_cached(args: &PullArgs, path: &Path, ui: &Ui) -> Result<(), Failure> {
    let name = &args.name.0;
    let facts = json!({
        "model": name.repository,
        "revision": name.revision.as_deref().unwrap_or("main"),
        "commit": path.file_name().map(|commit| commit.to_string_lossy()),
        "path": path,
        "bytes": 0,
        "from_cache": true,
    });
    if ui.json { ui.json_data(&facts) } else { ui.data(&path.display().to_string()) }.map_err(output)
}

fn check_disk(plan: &Plan) -> Result<(), Failure> {
    let path = plan.path();
    let existing = path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("."));
    let needed = plan.missing();
    match disk::free_bytes(existing) {
        Ok(free) if needed > 0 && free < needed.saturating_add(SPARE) => {
            Err(Failure::new("disk_full", format!("{} does not fit on the disk of the cache", plan.name))
                .detail(format!(
                    "needed: {}, free: {} in {}",
                    text::bytes(needed),
                    text::bytes(free),
                    existing.display()
                ))
                .hint("free some space, or put the cache elsewhere: `HF_HUB_CACHE=FOLDER lora pull ...`")
                .with("needed", needed)
                .with("free", free))
        }
        // Not every file system can be asked; writing will tell.
        _ => Ok(()),
    }
}

fn facts(plan: &Plan) -> Value {
    let file = |file: &Planned| json!({"path": file.name, "size": file.size, "cached": file.is_there});
    json!({
        "model": plan.name.repository,
        "revision": plan.name.revision.as_deref().unwrap_or("main"),
        "commit": plan.commit,
        "path": plan.path(),
        "files": plan.files.iter().map(file).collect::<Vec<_>>(),
        "size": plan.size(),
    })
}

fn say_plan(plan: &Plan, ui: &Ui) -> Result<(), Failure> {
    if ui.json {
        let mut facts = facts(plan);
        facts["missing"] = json!(plan.missing());
        return ui.json_data(&facts).map_err(output);
    }
    let line = |file: &Planned| {
        let note = match (file.is_there, file.half) {
            (true, _) => "  in the cache".to_owned(),
            (false, 0) => String::new(),
            (false, half) => format!("  {} of it are there", text::bytes(half)),
        };
        format!("{:>10}  {}{note}", text::bytes(file.size), printable(&file.name))
    };
    let mut lines: Vec<_> = plan.files.iter().map(line).collect();
    let files = text::plural(plan.files.len() as u64, "file");
    lines.push(format!("{:>10}  {files}, {} to fetch", text::bytes(plan.size()), text::bytes(plan.missing())));
    ui.data(&lines.join("\n")).map_err(output)
}

fn say_place(plan: &Plan, path: &Path, bytes: u64, ui: &Ui) -> Result<(), Failure> {
    if ui.json {
        let mut facts = facts(plan);
        facts["bytes"] = json!(bytes);
        facts["from_cache"] = json!(false);
        return ui.json_data(&facts).map_err(output);
    }
    ui.data(&path.display().to_string()).map_err(output)
}
