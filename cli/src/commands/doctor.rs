//! `lora doctor`: what is installed, what is missing, what to do about it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use serde::Serialize;
use serde_json::json;

use crate::{
    Failure,
    commands::output,
    disk,
    failure::Exit,
    launch::{self, LIBTORCH_VERSION, Libtorch},
    options::Surroundings,
    text,
    ui::Ui,
};

/// Free space below which a run is likely to fail.
const LITTLE_SPACE: u64 = 2 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warn,
    Fail,
}

/// One line of the examination.
#[derive(Debug, Clone, Serialize)]
struct Finding {
    state: State,
    /// What was looked at, one word.
    subject: &'static str,
    /// What was found.
    text: String,
    /// What to do about it.
    hint: Option<String>,
}

impl Finding {
    fn new(state: State, subject: &'static str, text: impl Into<String>) -> Self {
        Self { state, subject, text: text.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

pub(crate) fn run(ui: &Ui) -> Result<ExitCode, Failure> {
    let findings = examine();
    let failed = findings.iter().any(|finding| finding.state == State::Fail);
    if ui.json {
        ui.json_data(&json!({ "ok": !failed, "findings": findings })).map_err(output)?;
    } else {
        let paint = ui.stdout();
        let mut lines = Vec::new();
        for finding in &findings {
            let state = match finding.state {
                State::Ok => paint.green("ok  "),
                State::Warn => paint.yellow("warn"),
                State::Fail => paint.red("fail"),
            };
            lines.push(format!("{state}  {:<10} {}", finding.subject, finding.text));
            lines.extend(finding.hint.iter().map(|hint| format!("      {} {hint}", paint.cyan("hint:"))));
        }
        ui.data(&lines.join("\n")).map_err(output)?;
    }
    Ok(if failed { Exit::Failed.into() } else { ExitCode::SUCCESS })
}

fn examine() -> Vec<Finding> {
    let mut findings = vec![Finding::new(State::Ok, "lora", env!("CARGO_PKG_VERSION"))];
    let libtorch = launch::find_libtorch();
    match &libtorch {
        Ok(libtorch) => findings.extend(torch(libtorch)),
        Err(failure) => {
            let mut finding = Finding::new(State::Fail, "libtorch", failure.message.clone());
            for detail in &failure.details {
                finding.text += &format!("\n{:17}{detail}", "");
            }
            finding.hint = failure.hint.clone();
            findings.push(finding);
        }
    }
    findings.push(engine(libtorch.is_ok()));
    findings.push(gpu(libtorch.as_ref().ok()));
    findings.push(machine());
    findings.extend(disks());
    findings.push(models());
    findings.push(hub());
    findings.extend(configuration());
    findings
}

/// The libraries: version, what the CPU build needs, and whether the CUDA build is there.
fn torch(libtorch: &Libtorch) -> Vec<Finding> {
    let mut findings = Vec::new();
    let place = format!("{} ({})", libtorch.lib.display(), libtorch.found_by);
    findings.push(match version(&libtorch.lib) {
        Some(version) if version == LIBTORCH_VERSION => {
            Finding::new(State::Ok, "libtorch", format!("{version} in {place}"))
        }
        Some(version) => Finding::new(
            State::Fail,
            "libtorch",
            format!("{version} in {place}; the engine is built for {LIBTORCH_VERSION}"),
        )
        .hint("unset LIBTORCH or point it to the right version; `cargo xtask setup` fetches it"),
        None => Finding::new(State::Warn, "libtorch", format!("of unknown version in {place}"))
            .hint(format!("the engine needs {LIBTORCH_VERSION}; `cargo xtask setup` fetches it")),
    });
    // The wheel's CPU library is linked to these two even where there is no GPU.
    let missing: Vec<_> = ["libcudart.so.13", "libcupti.so.13"]
        .into_iter()
        .filter(|name| libtorch.lib.join("libc10_cuda.so").exists() && find_library(libtorch, name).is_none())
        .collect();
    if !missing.is_empty() {
        findings.push(
            Finding::new(
                State::Fail,
                "libtorch",
                format!("{} not found, needed by libtorch_cpu", missing.join(" and ")),
            )
            .hint("`cargo xtask setup` fetches the wheels nvidia-cuda-runtime and nvidia-cuda-cupti beside libtorch"),
        );
    }
    findings
}

/// Whether the engine is there and starts.
fn engine(has_libtorch: bool) -> Finding {
    let path = match launch::find_engine() {
        Ok(path) => path,
        Err(failure) => {
            let finding = Finding::new(State::Fail, "engine", failure.details.join(", "));
            return finding.hint(failure.hint.unwrap_or_default());
        }
    };
    if !has_libtorch {
        return Finding::new(State::Warn, "engine", format!("{} cannot start without libtorch", path.display()));
    }
    let started = launch::engine_command().map_err(|failure| failure.message).and_then(|mut engine| {
        let engine = engine.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        engine.output().map_err(|error| error.to_string())
    });
    match started {
        Ok(done) if done.status.success() => {
            let version = String::from_utf8_lossy(&done.stdout).trim().to_owned();
            let ours = env!("CARGO_PKG_VERSION");
            let text = format!("{version} in {}", path.display());
            match version.split_whitespace().any(|word| word == ours) {
                true => Finding::new(State::Ok, "engine", text),
                false => Finding::new(State::Warn, "engine", text)
                    .hint("lora and lora-engine belong together: build both anew"),
            }
        }
        Ok(done) => {
            let reason = String::from_utf8_lossy(&done.stderr);
            let reason = reason.lines().next().unwrap_or("no message");
            Finding::new(State::Fail, "engine", format!("does not start ({}): {reason}", done.status))
                .hint("`cargo xtask setup` completes libtorch; a newer engine needs a new build")
        }
        Err(reason) => Finding::new(State::Fail, "engine", format!("does not start: {reason}")),
    }
}

/// The libraries of the CUDA set-up, besides what the CPU needs too.
const CUDA_LIBRARIES: [&str; 4] = ["libtorch_cuda.so", "libcublas.so.13", "libcudnn.so.9", "libnccl.so.2"];

/// GPU, driver and the CUDA set-up of libtorch: all three or none.
fn gpu(libtorch: Option<&Libtorch>) -> Finding {
    let missing: Vec<_> = CUDA_LIBRARIES
        .into_iter()
        .filter(|name| libtorch.is_none_or(|libtorch| find_library(libtorch, name).is_none()))
        .collect();
    let driver = driver_version();
    let names = gpu_names();
    let driver_library = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/aarch64-linux-gnu", "/usr/lib/wsl/lib"]
        .iter()
        .any(|folder| Path::new(folder).join("libcuda.so.1").exists());
    if driver.is_none() && names.is_empty() && !driver_library {
        let set_up = if missing.is_empty() { "CUDA" } else { "CPU" };
        return Finding::new(
            State::Ok,
            "gpu",
            format!("no NVIDIA GPU seen: training runs on the CPU ({set_up} set-up of libtorch)"),
        );
    }
    let driver = driver.map_or_else(|| "driver of unknown version".into(), |version| format!("driver {version}"));
    let names = if names.is_empty() { "an NVIDIA GPU".to_owned() } else { names.join(", ") };
    match missing.is_empty() {
        true => Finding::new(State::Ok, "gpu", format!("{names}, {driver}, CUDA set-up of libtorch")),
        false => Finding::new(State::Warn, "gpu", format!("{names}, {driver}, but {} not found", missing.join(", ")))
            .hint("`cargo xtask setup --cuda` fetches the CUDA set-up; without it training runs on the CPU"),
    }
}

fn machine() -> Finding {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    let memory = memory.map_or_else(String::new, |kib| format!(", {} of memory free", text::bytes(kib * 1024)));
    Finding::new(State::Ok, "machine", format!("{}{memory}", text::plural(threads as u64, "thread")))
}

fn disks() -> Vec<Finding> {
    let mut places = vec![("here", env::current_dir().unwrap_or_else(|_| ".".into()))];
    places.extend(launch::cache_folder().map(|cache| ("cache", cache)));
    places
        .into_iter()
        .map(|(name, path)| {
            let existing = path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
            match disk::free_bytes(existing) {
                Ok(free) => {
                    let text = format!("{} free for {} ({name})", text::bytes(free), path.display());
                    match free < LITTLE_SPACE {
                        true => Finding::new(State::Warn, "disk", text).hint("a run needs room for its checkpoints"),
                        false => Finding::new(State::Ok, "disk", text),
                    }
                }
                Err(error) => Finding::new(State::Warn, "disk", format!("cannot ask for {}: {error}", path.display())),
            }
        })
        .collect()
}

/// The models that `--base org/name` finds.
fn models() -> Finding {
    match lora_core::hub::cache() {
        Ok(cache) => {
            let entries = fs::read_dir(&cache).into_iter().flatten().flatten();
            let is_model = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("models--");
            let count = entries.filter(|entry| is_model(entry) && entry.path().join("snapshots").is_dir()).count();
            let found = match count {
                0 => "no models yet".to_owned(),
                count => text::plural(count as u64, "model"),
            };
            Finding::new(State::Ok, "models", format!("{found} in the cache {}", cache.display()))
        }
        Err(error) => {
            Finding::new(State::Warn, "models", error.to_string()).hint("set HF_HOME to a folder with room for models")
        }
    }
}

/// What `lora pull` would ask, and as whom; a token is never shown, and not tried here.
#[cfg(feature = "hub")]
fn hub() -> Finding {
    use lora_hub::{Settings, offline_by};
    match Settings::from_env() {
        Err(error) => Finding::new(State::Warn, "hub", error.to_string())
            .hint("`lora pull` needs this in order; everything else works without"),
        Ok(settings) => {
            let login = match &settings.token {
                Some(token) => format!("a token from {}", token.source()),
                None => "no token (public models need none)".to_owned(),
            };
            let text = format!("{}, {login}", settings.endpoint);
            match offline_by() {
                Some(by) => Finding::new(State::Ok, "hub", format!("{text}; {by} forbids the network")),
                None => Finding::new(State::Ok, "hub", text),
            }
        }
    }
}

/// There is no `lora pull` in this program.
#[cfg(not(feature = "hub"))]
fn hub() -> Finding {
    Finding::new(State::Ok, "hub", "built without the feature `hub`: this program opens no network connection")
}

/// The configuration files that would be read; `lora config show` checks what is in them.
fn configuration() -> Vec<Finding> {
    let surroundings = Surroundings::here();
    let user = surroundings.user.clone().filter(|path| path.is_file());
    let files: Vec<PathBuf> = surroundings.project().into_iter().chain(user).collect();
    match files.is_empty() {
        true => {
            vec![Finding::new(State::Ok, "config", "no lora.toml and no user configuration: presets and defaults hold")]
        }
        false => files.iter().map(|path| Finding::new(State::Ok, "config", path.display().to_string())).collect(),
    }
}

/// The version that the headers of a libtorch name, or else its Python wheel.
fn version(lib: &Path) -> Option<String> {
    let root = lib.parent()?;
    // The first is where it has been since 2.10, the second where it was before.
    let headers = ["include/torch/headeronly/version.h", "include/torch/csrc/api/include/torch/version.h"];
    let from_header = headers.iter().find_map(|header| {
        let text = fs::read_to_string(root.join(header)).ok()?;
        let number = |name: &str| {
            let line = text.lines().find(|line| line.contains(&format!("define TORCH_VERSION_{name} ")))?;
            line.split_whitespace().last()?.parse::<u32>().ok()
        };
        Some(format!("{}.{}.{}", number("MAJOR")?, number("MINOR")?, number("PATCH")?))
    });
    from_header.or_else(|| {
        let text = fs::read_to_string(root.join("build-version")).ok()?;
        Some(text.trim().split('+').next()?.to_owned())
    })
}

fn find_library(libtorch: &Libtorch, name: &str) -> Option<PathBuf> {
    let own = libtorch.library_path();
    let set = env::var_os("LD_LIBRARY_PATH");
    let set = set.iter().flat_map(env::split_paths);
    let system = ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"].map(PathBuf::from);
    own.into_iter().chain(set).chain(system).map(|folder| folder.join(name)).find(|path| path.exists())
}

fn driver_version() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let words = text.lines().next()?.split_whitespace();
    words
        .into_iter()
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
        .map(str::to_owned)
}

fn gpu_names() -> Vec<String> {
    let cards = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let mut names: Vec<_> = cards
        .filter_map(|card| fs::read_to_string(card.path().join("information")).ok())
        .filter_map(|text| Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned()))
        .collect();
    names.sort_unstable();
    names
}
