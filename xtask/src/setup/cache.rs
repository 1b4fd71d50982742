//! The per-user cache: libtorch out of the package index's wheels, laid out like `site-packages`.
//!
//! The libraries find each other through the relative RPATHs that the wheels carry, so the layout must be kept:
//! `torch/{lib,include}` and `nvidia/*/{lib,include}`. pip compares every file with the SHA-256 written in
//! `xtask/libtorch/*.txt`. The folder is filled under another name and renamed, so it is complete or absent.

use std::{
    fs,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, anyhow, bail};

use super::{Flavour, VERSION};
use crate::shell;

/// Unpacks libraries and headers of one wheel; Python's own extension is left out.
const UNPACK: &str = "
import sys, zipfile
wheel, out = sys.argv[1:]
def wanted(name):
    top, *rest = name.split('/')
    if name.endswith('/libtorch_python.so'): return False
    return top == 'torch' and rest[0] in ('lib', 'include') or top == 'nvidia' and rest[1] in ('lib', 'include')
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(out, [name for name in archive.namelist() if not name.endswith('/') and wanted(name)])
";

/// The platforms whose wheels run here, newest first; older pips do not derive one from the other.
const PLATFORMS: [&str; 10] = [
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_25_x86_64",
    "manylinux_2_18_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux_2_12_x86_64",
    "manylinux_2_5_x86_64",
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
];

/// Where a cached libtorch of this flavour may lie; the CUDA one serves CPU work as well.
pub(super) fn places(flavour: Flavour) -> Result<Vec<PathBuf>> {
    let cuda = folder(Flavour::Cuda)?.join("torch");
    Ok(match flavour {
        Flavour::Cuda => vec![cuda],
        Flavour::Cpu => vec![cuda, folder(Flavour::Cpu)?.join("torch")],
    })
}

/// Fetches and unpacks what is missing; gives the folder of libtorch.
pub(super) fn fill(flavour: Flavour) -> Result<PathBuf> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!(
            "wheels are known for Linux on x86-64 only\nhint: unpack libtorch {VERSION} and set LIBTORCH to its folder"
        );
    }
    let started = Instant::now();
    let place = folder(flavour)?;
    let parent = place.parent().context("the cache folder has no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    remove_leavings(parent)?;
    let work = Work::new(&place)?;

    let base = folder(Flavour::Cpu)?;
    if flavour == Flavour::Cuda && base.join("torch/lib").exists() {
        println!("taking the CPU half from {}", base.display());
        link_tree(&base, &work.0).with_context(|| format!("cannot link {}", base.display()))?;
    } else {
        fetch("cpu.txt", "about 540 MB", &work.0)?;
    }
    if flavour == Flavour::Cuda {
        fetch("cuda.txt", "about 1.9 GB", &work.0)?;
    }

    match fs::rename(&work.0, &place) {
        Ok(()) => {}
        Err(_) if place.join("torch/lib").exists() => {} // another set-up was faster; its result is as good
        Err(error) => return Err(error).with_context(|| format!("cannot move libtorch to {}", place.display())),
    }
    println!("unpacked in {:.0} s", started.elapsed().as_secs_f64());
    Ok(place.join("torch"))
}

/// Downloads the wheels of one list and unpacks them into `out`.
fn fetch(list: &str, size: &str, out: &Path) -> Result<()> {
    println!("fetching libtorch {VERSION} from the Python package index ({size}, once per user)");
    let wheels = out.join("wheels");
    let mut pip = shell::python()?;
    pip.args(["-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"])
        .args(["--disable-pip-version-check", "--progress-bar", if io::stdout().is_terminal() { "on" } else { "off" }])
        .args(["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none"]);
    for platform in PLATFORMS {
        pip.args(["--platform", platform]);
    }
    pip.arg("--dest").arg(&wheels).arg("--requirement").arg(shell::root()?.join("xtask/libtorch").join(list));
    shell::run(&mut pip).map_err(|error| {
        anyhow!(
            "{error:#}\nhint: `python3 -m pip --version` must work (Debian: apt install python3-pip) and the package index \
             be reachable; or set LIBTORCH to the folder of an unpacked libtorch {VERSION}"
        )
    })?;
    for wheel in fs::read_dir(&wheels)? {
        let wheel = wheel?.path();
        shell::run(shell::python()?.args(["-c", UNPACK]).arg(&wheel).arg(out))?;
        fs::remove_file(&wheel)?;
    }
    fs::remove_dir(&wheels).context("wheels are left over")
}

/// `$XDG_CACHE_HOME/lora/libtorch-VERSION`, by default under `~/.cache`.
fn folder(flavour: Flavour) -> Result<PathBuf> {
    let cache = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => std::env::home_dir().context("there is no home folder; set XDG_CACHE_HOME")?.join(".cache"),
    };
    let suffix = if flavour == Flavour::Cuda { "-cuda" } else { "" };
    Ok(cache.join("lora").join(format!("libtorch-{VERSION}{suffix}")))
}

/// A folder that is removed unless it was renamed away.
struct Work(PathBuf);

impl Work {
    fn new(place: &Path) -> Result<Self> {
        let mut name = place.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let folder = place.with_file_name(name);
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // It is gone where all went well; where something failed, that error matters more than this one.
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Removes work folders of set-ups that were killed: those whose process is no more.
fn remove_leavings(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let owner = name.strip_suffix(".part").and_then(|name| name.rsplit('.').next()?.parse::<u32>().ok());
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The same files under another folder, without copying their bytes.
fn link_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            link_tree(&entry.path(), &target)?;
        } else {
            fs::hard_link(entry.path(), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leavings_of_dead_processes_go_and_everything_else_stays() {
        let here = tempfile::tempdir().unwrap();
        let dead = format!("libtorch-{VERSION}.{}.part", u32::MAX);
        let mine = format!("libtorch-{VERSION}.{}.part", std::process::id());
        for name in [&dead, &mine, &format!("libtorch-{VERSION}")] {
            fs::create_dir(here.path().join(name)).unwrap();
        }
        remove_leavings(here.path()).unwrap();
        assert!(!here.path().join(dead).exists());
        assert_eq!(fs::read_dir(here.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_unfinished_work_folder_leaves_nothing() {
        let here = tempfile::tempdir().unwrap();
        let work = Work::new(&here.path().join("libtorch")).unwrap();
        fs::write(work.0.join("half"), "x").unwrap();
        drop(work);
        assert_eq!(fs::read_dir(here.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_linked_tree_holds_the_same_files() {
        let here = tempfile::tempdir().unwrap();
        let (from, to) = (here.path().join("from"), here.path().join("to"));
        fs::create_dir_all(from.join("torch/lib")).unwrap();
        fs::write(from.join("torch/lib/a.so"), "a").unwrap();
        link_tree(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("torch/lib/a.so")).unwrap(), "a");
    }

    /// Only names with a digest: pip would refuse the list otherwise, but only on the day when somebody needs it.
    #[test]
    fn every_pinned_wheel_has_its_digest() {
        for list in [include_str!("../../libtorch/cpu.txt"), include_str!("../../libtorch/cuda.txt")] {
            for line in list.lines().filter(|line| !line.starts_with('#')) {
                let (name, digest) = line.split_once(" --hash=sha256:").unwrap();
                assert!(name.contains("=="), "{line}");
                assert!(digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()), "{line}");
            }
        }
    }
}
