//! Compiles the two pieces of C++: what autograd is told is linked in, what CUDA needs is a shared object that
//! `src/cuda.rs` embeds and opens at run time.
//!
//! The headers come from the libtorch folder and, for CUDA, from the runtime's wheels beside it. Where these are missing an
//! empty file takes the object's place: everything but CUDA works, and the engine says why.

use std::{
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=shim/autograd.cpp");
    println!("cargo::rerun-if-changed=shim/cuda.cpp");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-env-changed=CXX");
    link_autograd();
    let output = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("lora_cuda.so");
    let reason = match compile(&output) {
        Ok(()) => String::new(),
        Err(reason) => {
            println!("cargo::warning=built without CUDA: {reason}");
            fs::write(&output, []).expect("OUT_DIR can be written");
            reason
        }
    };
    println!("cargo::rustc-env=LORA_CUDA_SHIM={}", output.display());
    println!("cargo::rustc-env=LORA_CUDA_SHIM_MISSING={}", reason.replace('\n', " "));
}

/// `torch-sys` has compiled against the same headers with the same compiler, so that this can.
fn link_autograd() {
    let libtorch = PathBuf::from(env::var_os("LIBTORCH").expect("LIBTORCH is the folder of libtorch"));
    let include = libtorch.join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .includes([include.join("torch/csrc/api/include"), include])
        .file("shim/autograd.cpp")
        .compile("lora_autograd");
}

fn compile(output: &Path) -> Result<(), String> {
    let libtorch = PathBuf::from(env::var_os("LIBTORCH").ok_or("LIBTORCH is not set")?);
    let torch = libtorch.join("include");
    // The wheel of libtorch lies beside the folder `nvidia`; a link to it must be followed first.
    let beside = fs::canonicalize(&libtorch).map_err(|error| format!("{}: {error}", libtorch.display()))?;
    let cuda = env::var_os("CUDA_HOME").map(PathBuf::from).unwrap_or_default().join("include");
    let folders = [beside.join("../nvidia/cu13/include"), cuda];
    let cuda = folders
        .iter()
        .find(|folder| folder.join("cuda_runtime.h").is_file() && folder.join("crt/host_config.h").is_file())
        .ok_or_else(|| format!("no CUDA headers in {}", folders[0].display()))?;
    let compiler = env::var_os("CXX").unwrap_or_else(|| OsString::from("c++"));
    let result = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-D_GLIBCXX_USE_CXX11_ABI=1"])
        .args([OsString::from("-isystem"), torch.clone().into_os_string()])
        .args([OsString::from("-isystem"), torch.join("torch/csrc/api/include").into_os_string()])
        .args([OsString::from("-isystem"), cuda.clone().into_os_string()])
        .arg("shim/cuda.cpp")
        .arg("-o")
        .arg(output)
        .output();
    match result {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(first_error(&done.stderr)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("the compiler {} is missing", compiler.display()))
        }
        Err(error) => Err(format!("{}: {error}", compiler.display())),
    }
}

fn first_error(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    text.lines().find(|line| line.contains("error")).unwrap_or("the compiler failed").to_owned()
}
