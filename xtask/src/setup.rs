//! `cargo xtask setup [--cuda]`: finds libtorch, or fetches it once per user, and links it as `.libtorch`.
//!
//! The order: `LIBTORCH`; the link that is there; the cache, filled by an earlier set-up of any checkout; a Python that
//! has torch of the right version; the wheels of the package index. A set-up that is done costs a few file look-ups and
//! never starts Python. What lies in the cache is complete: it was unpacked beside its place and renamed.

mod cache;
mod found;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::shell;
use found::Libtorch;

/// The libtorch that `tch` 0.24 is written for; both move together.
pub(crate) const VERSION: &str = "2.11.0";

/// Which libraries a set-up must bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    /// libtorch and the two CUDA libraries that its CPU half asks for.
    Cpu,
    /// Whatever torch uses on a GPU.
    Cuda,
}

/// The task: makes `.libtorch` and says what it found.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let asked_for_cuda = match arguments {
        [] => false,
        [one] if one == "--cuda" => true,
        other => bail!("`setup` does not know `{}`; it takes --cuda", other.join(" ")),
    };
    let link = shell::root()?.join(".libtorch");
    let flavour = if asked_for_cuda || sees_gpu() { Flavour::Cuda } else { Flavour::Cpu };
    let (libtorch, origin) = match find_or_fetch(flavour, &link) {
        // Seeing a GPU is a guess at what the person wants; it must not keep them from working on the CPU.
        Err(error) if flavour == Flavour::Cuda && !asked_for_cuda => {
            println!("no libtorch for the GPU: {error:#}\ngoing on with the CPU");
            find_or_fetch(Flavour::Cpu, &link)?
        }
        found => found?,
    };
    point(&link, &libtorch.folder)?;
    println!("libtorch {VERSION} ({}): {} ({origin})", libtorch.extent(), libtorch.folder.display());
    Ok(())
}

/// The first place that holds what is asked for, and how it was found.
fn find_or_fetch(flavour: Flavour, link: &Path) -> Result<(Libtorch, &'static str)> {
    if let Some(folder) = named_by_environment(link) {
        // A person who sets the variable means it: a wrong version is an error, not a reason to look elsewhere.
        let libtorch = Libtorch::at(&folder).with_context(|| format!("LIBTORCH={}", folder.display()))?;
        return Ok((libtorch, "from LIBTORCH"));
    }
    if let Ok(target) = fs::canonicalize(link)
        && let Some(libtorch) = suits(&target, flavour)
    {
        return Ok((libtorch, "linked already"));
    }
    for folder in cache::places(flavour)? {
        if let Some(libtorch) = suits(&folder, flavour) {
            return Ok((libtorch, "from the cache"));
        }
    }
    if let Some(folder) = found::in_python()
        && let Ok(libtorch) = Libtorch::at(&folder)
        && (flavour == Flavour::Cpu || libtorch.has_cuda_half())
    {
        // Where the rest of CUDA lies is the business of whoever installed this torch.
        return Ok((libtorch, "from Python's torch"));
    }
    let folder = cache::fill(flavour)?;
    Ok((Libtorch::at(&folder)?, "fetched just now"))
}

/// What is there, if it is the right version and brings the asked libraries.
fn suits(folder: &Path, flavour: Flavour) -> Option<Libtorch> {
    Libtorch::at(folder).ok().filter(|libtorch| flavour == Flavour::Cpu || libtorch.cuda)
}

/// `LIBTORCH`, unless it is the link itself: cargo sets it so for everything that it starts.
fn named_by_environment(link: &Path) -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("LIBTORCH")?);
    (folder != link).then_some(folder)
}

fn sees_gpu() -> bool {
    Path::new("/proc/driver/nvidia/version").exists()
        || std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("nvidia-smi").exists()))
}

/// Makes `link` a symbolic link to `target`, replacing another link in one step but nothing else.
fn point(link: &Path, target: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|current| current == target) || same_place(link, target) {
        return Ok(());
    }
    if fs::symlink_metadata(link).is_ok_and(|there| !there.file_type().is_symlink()) {
        bail!("{} is in the way and is no link; move it elsewhere", link.display());
    }
    let fresh = link.with_extension(format!("{}.part", std::process::id()));
    symlink(target, &fresh).with_context(|| format!("cannot make the link {}", fresh.display()))?;
    fs::rename(&fresh, link).with_context(|| format!("cannot make the link {}", link.display()))
}

fn same_place(one: &Path, other: &Path) -> bool {
    matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::Error::other("set LIBTORCH to the folder of libtorch; links are made on Unix only"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_moves_to_another_target_and_stays_where_it_is_right() {
        let here = tempfile::tempdir().unwrap();
        let (one, two, link) = (here.path().join("one"), here.path().join("two"), here.path().join("link"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&two).unwrap();
        for target in [&one, &one, &two] {
            point(&link, target).unwrap();
            assert_eq!(&fs::read_link(&link).unwrap(), target);
        }
    }

    #[test]
    fn a_folder_in_the_place_of_the_link_is_left_alone() {
        let here = tempfile::tempdir().unwrap();
        let link = here.path().join(".libtorch");
        fs::create_dir(&link).unwrap();
        assert!(point(&link, here.path()).unwrap_err().to_string().contains("in the way"));
        assert!(link.is_dir());
    }
}
