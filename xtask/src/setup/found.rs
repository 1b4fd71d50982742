//! Recognising a libtorch that is there already: its version, from the headers, and what it can run on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::VERSION;
use crate::shell;

/// A folder with `lib/` and `include/` of libtorch in the version that `tch` asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Libtorch {
    /// The folder.
    pub(super) folder: PathBuf,
    /// Whether the libraries that its CUDA half loads are there too.
    pub(super) cuda: bool,
}

impl Libtorch {
    /// Looks at one folder.
    ///
    /// # Errors
    /// If libraries or headers are missing, or the version is another one.
    pub(super) fn at(folder: &Path) -> Result<Self> {
        let library = folder.join("lib/libtorch_cpu.so");
        if !library.exists() {
            bail!("there is no {}", library.display());
        }
        let header = folder.join("include/torch/headeronly/version.h");
        let text = fs::read_to_string(&header).with_context(|| format!("cannot read {}", header.display()))?;
        let version = version(&text).with_context(|| format!("{} names no version", header.display()))?;
        if version != VERSION {
            bail!("this is libtorch {version}; {VERSION} is needed");
        }
        Ok(Self { folder: folder.to_owned(), cuda: has_cuda(folder) })
    }

    /// Whether libtorch itself was built with CUDA, wherever the libraries of NVIDIA lie.
    pub(super) fn has_cuda_half(&self) -> bool {
        self.folder.join("lib/libtorch_cuda.so").exists()
    }

    /// In words: what it runs on.
    pub(super) fn extent(&self) -> &'static str {
        if self.cuda { "CPU and CUDA" } else { "CPU" }
    }
}

/// `MAJOR.MINOR.PATCH` from the macros of `version.h`.
fn version(header: &str) -> Option<String> {
    let part = |name: &str| {
        header.lines().find_map(|line| line.strip_prefix("#define ")?.strip_prefix(name)?.trim().parse::<u32>().ok())
    };
    let (major, minor, patch) =
        (part("TORCH_VERSION_MAJOR ")?, part("TORCH_VERSION_MINOR ")?, part("TORCH_VERSION_PATCH ")?);
    Some(format!("{major}.{minor}.{patch}"))
}

/// libtorch's CUDA half is there, and cuDNN, which its wheel leaves to another one, where the loader will look: beside
/// it (a wheel's layout) or in the same folder (the archives of the project's own site).
fn has_cuda(folder: &Path) -> bool {
    let lib = folder.join("lib");
    let beside = fs::canonicalize(folder).ok().and_then(|folder| Some(folder.parent()?.join("nvidia/cudnn/lib")));
    lib.join("libtorch_cuda.so").exists()
        && [Some(lib), beside].iter().flatten().any(|place| place.join("libcudnn.so.9").exists())
}

/// The torch package of the Python that is there, if its version is the right one. torch is not imported: that takes
/// two seconds.
pub(super) fn in_python() -> Option<PathBuf> {
    let script = "
import importlib.metadata, importlib.util
try: print(importlib.metadata.version('torch').split('+')[0], importlib.util.find_spec('torch').submodule_search_locations[0])
except Exception: pass
";
    let told = shell::output(shell::python().ok()?.args(["-c", script])).ok()?;
    let (version, folder) = told.trim().split_once(' ')?;
    (version == VERSION).then(|| PathBuf::from(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn libtorch(version: [u32; 3]) -> tempfile::TempDir {
        let here = tempfile::tempdir().unwrap();
        let torch = here.path().join("torch");
        fs::create_dir_all(torch.join("lib")).unwrap();
        fs::create_dir_all(torch.join("include/torch/headeronly")).unwrap();
        fs::write(torch.join("lib/libtorch_cpu.so"), []).unwrap();
        let [major, minor, patch] = version;
        let header = format!(
            "#pragma once\n#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n\
             #define TORCH_VERSION_PATCH {patch}\n#define TORCH_VERSION_ABI_TAG 0\n"
        );
        fs::write(torch.join("include/torch/headeronly/version.h"), header).unwrap();
        here
    }

    #[test]
    fn the_right_version_is_recognised_and_another_refused() {
        let right = libtorch([2, 11, 0]);
        assert!(!Libtorch::at(&right.path().join("torch")).unwrap().cuda);
        let wrong = libtorch([2, 10, 1]);
        let error = Libtorch::at(&wrong.path().join("torch")).unwrap_err().to_string();
        assert_eq!(error, "this is libtorch 2.10.1; 2.11.0 is needed");
        assert!(Libtorch::at(wrong.path()).is_err());
    }

    #[test]
    fn cuda_needs_cudnn_too() {
        let here = libtorch([2, 11, 0]);
        let torch = here.path().join("torch");
        fs::write(torch.join("lib/libtorch_cuda.so"), []).unwrap();
        assert!(!Libtorch::at(&torch).unwrap().cuda);
        fs::create_dir_all(here.path().join("nvidia/cudnn/lib")).unwrap();
        fs::write(here.path().join("nvidia/cudnn/lib/libcudnn.so.9"), []).unwrap();
        assert!(Libtorch::at(&torch).unwrap().cuda);
    }
}
