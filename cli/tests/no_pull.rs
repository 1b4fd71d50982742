//! The program without the feature `hub`; `cargo xtask test` builds it for this.
#![cfg(not(feature = "hub"))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::Command;

#[test]
fn a_program_without_the_hub_says_so_and_how_to_build_one() {
    let output = Command::new(env!("CARGO_BIN_EXE_lora")).args(["pull", "org/name"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{stderr}");
    assert!(stderr.starts_with("error: this program was built without the feature `hub`"), "{stderr}");
    assert!(stderr.contains("hint: in a working copy: `cargo build --release -p lora-cli --features hub`"), "{stderr}");
}

/// What the feature adds is not there: no TLS, so no network.
#[test]
fn a_program_without_the_hub_has_no_tls() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_lora")).unwrap();
    assert!(!program.windows(7).any(|bytes| bytes == b"rustls/" || bytes == b"webpki-"));
}
