//! Finding the engine and libtorch, and becoming the engine.
//!
//! A program linked to libtorch cannot say that libtorch is missing: the loader ends it. So `lora` looks first.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::Failure;

/// The version of libtorch that the engine is built for.
pub const LIBTORCH_VERSION: &str = "2.11.0";

const ENGINE: &str = if cfg!(windows) { "lora-engine.exe" } else { "lora-engine" };
const TORCH_CPU: &str = if cfg!(target_os = "macos") {
    "libtorch_cpu.dylib"
} else if cfg!(windows) {
    "torch_cpu.dll"
} else {
    "libtorch_cpu.so"
};
const LIBRARY_PATH: &str = if cfg!(target_os = "macos") {
    "DYLD_LIBRARY_PATH"
} else if cfg!(windows) {
    "PATH"
} else {
    "LD_LIBRARY_PATH"
};

/// A libtorch on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libtorch {
    /// What led to it, in words.
    pub found_by: String,
    /// The folder with its libraries.
    pub lib: PathBuf,
    /// Folders with the libraries that it needs besides: `nvidia/*/lib`.
    pub companions: Vec<PathBuf>,
}

impl Libtorch {
    /// All folders that the loader must search.
    pub fn library_path(&self) -> Vec<PathBuf> {
        [vec![self.lib.clone()], self.companions.clone()].concat()
    }
}

/// The engine beside this program.
///
/// # Errors
/// If it is not there.
pub fn find_engine() -> Result<PathBuf, Failure> {
    let folder = program_folder();
    let engine = folder.join(ENGINE);
    if engine.is_file() {
        return Ok(engine);
    }
    Err(Failure::new("engine_missing", format!("`{ENGINE}` is missing: training and drawing need it"))
        .detail(format!("looked for {}", engine.display()))
        .hint("install both programs into one folder; in a working copy: `cargo xtask setup && cargo build --release`")
        .with("path", engine.display().to_string()))
}

/// The first libtorch in: `$LIBTORCH`, the folder `lib` beside the program, `.libtorch` of the working copy that the
/// program was built in, the user's cache.
///
/// # Errors
/// If there is none; the error lists where it was sought.
pub fn find_libtorch() -> Result<Libtorch, Failure> {
    let mut sought = Vec::new();
    for (found_by, lib) in candidates() {
        if lib.join(TORCH_CPU).is_file() {
            let companions = companions(&lib);
            return Ok(Libtorch { found_by, lib, companions });
        }
        sought.push(format!("{found_by}: no {TORCH_CPU} in {}", lib.display()));
    }
    let failure = Failure::new(
        "libtorch_missing",
        format!("libtorch {LIBTORCH_VERSION} is missing: training and drawing need it"),
    );
    Err(sought
        .into_iter()
        .fold(failure, Failure::detail)
        .hint("in a working copy `cargo xtask setup` fetches it; else set LIBTORCH to the folder that holds its `lib`. `lora doctor` says more"))
}

/// Becomes the engine: the same words, the libraries in its path. Comes back only if that fails.
///
/// # Errors
/// If engine or libtorch is missing, or the engine cannot be started.
pub fn launch(words: &[OsString], offline: bool) -> Result<std::process::ExitCode, Failure> {
    let mut engine = engine_command()?;
    engine.args(words.iter().skip(1));
    if offline {
        engine.env("HF_HUB_OFFLINE", "1");
    }
    become_process(engine)
}

/// The engine with its library path set.
///
/// # Errors
/// If engine or libtorch is missing.
pub fn engine_command() -> Result<Command, Failure> {
    let engine = find_engine()?;
    let libtorch = find_libtorch()?;
    let mut folders = libtorch.library_path();
    folders.extend(env::var_os(LIBRARY_PATH).iter().flat_map(env::split_paths));
    let mut command = Command::new(engine);
    // A folder whose name holds the separator cannot be in a path; the loader would not find it either way.
    if let Ok(joined) = env::join_paths(folders) {
        command.env(LIBRARY_PATH, joined);
    }
    for (name, value) in ALLOCATOR.iter().filter(|(name, _)| env::var_os(name).is_none()) {
        command.env(name, value);
    }
    let (spins, count) = WAITING;
    if ["OMP_WAIT_POLICY", spins].iter().all(|name| env::var_os(name).is_none()) {
        command.env(spins, count);
    }
    Ok(command)
}

/// How long a thread of GNU's OpenMP spins for the others before it sleeps: its own number for crowded machines.
///
/// Its usual 300,000 turns hold a core for milliseconds while the thread that is waited for has none: on two cores with six
/// other busy programs 12 steps on the bundled base took 42 s, with this 6 s.
const WAITING: (&str, &str) = ("GOMP_SPINCOUNT", "1000");

/// How glibc's allocator treats tensors: kept and used again instead of given back after every operation, in large pages.
///
/// 8 % of a training step on the bundled base (one thread: 156 → 143 ms of processor time); other C libraries ignore it.
const ALLOCATOR: [(&str, &str); 3] = [
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TRIM_THRESHOLD_", "536870912"),
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
];

#[cfg(unix)]
fn become_process(mut command: Command) -> Result<std::process::ExitCode, Failure> {
    use std::os::unix::process::CommandExt as _;
    let error = command.exec();
    Err(Failure::from_error("engine_failed", &error)
        .detail(format!("starting {}", Path::new(command.get_program()).display()))
        .hint("`lora doctor` looks at the installation"))
}

#[cfg(not(unix))]
fn become_process(mut command: Command) -> Result<std::process::ExitCode, Failure> {
    let status = command.status().map_err(|error| {
        Failure::from_error("engine_failed", &error).hint("`lora doctor` looks at the installation")
    })?;
    Ok(std::process::ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

fn candidates() -> Vec<(String, PathBuf)> {
    let mut candidates = Vec::new();
    if let Some(root) = env::var_os("LIBTORCH").filter(|root| !root.is_empty()) {
        candidates.push(("the variable LIBTORCH".to_owned(), PathBuf::from(root).join("lib")));
    }
    let folder = program_folder();
    candidates.push(("beside the program".into(), folder.join("lib")));
    if let Some(copy) = folder.ancestors().map(|folder| folder.join(".libtorch")).find(|path| path.exists()) {
        candidates.push((".libtorch of the working copy".into(), copy.join("lib")));
    }
    if let Some(cache) = cache_folder() {
        let lib = cache.join(format!("libtorch-{LIBTORCH_VERSION}")).join("torch").join("lib");
        candidates.push(("the cache".into(), lib));
    }
    candidates
}

/// Where `cargo xtask setup` keeps libtorch, and the engine its latents.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".cache"));
    set("XDG_CACHE_HOME").or_else(home).map(|cache| cache.join("lora"))
}

/// `nvidia/*/lib` beside the wheel's `torch` folder, links followed.
fn companions(lib: &Path) -> Vec<PathBuf> {
    let real = lib.canonicalize().unwrap_or_else(|_| lib.to_owned());
    let Some(wheels) = real.parent().and_then(Path::parent) else { return Vec::new() };
    let mut folders: Vec<_> = fs::read_dir(wheels.join("nvidia"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("lib"))
        .filter(|path| path.is_dir())
        .collect();
    folders.sort_unstable();
    folders
}

/// The folder of this program, links followed.
fn program_folder() -> PathBuf {
    let program = env::current_exe().and_then(|path| path.canonicalize()).unwrap_or_default();
    program.parent().map(Path::to_owned).unwrap_or_default()
}
