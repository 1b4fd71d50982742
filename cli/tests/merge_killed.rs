//! `lora merge` over its own base, killed again and again: the file is always the old one or the new one, and the next run
//! needs nobody to clean up before it.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

const KILLS: u32 = 20;

fn merge(folder: &Path, base: &str, out: &str) -> Child {
    let words = ["merge", "-q", "--base", base, "--lora", "adapter.safetensors", "--out", out];
    support::command(folder).args(words).stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_merge_leaves_the_old_file_or_the_new_one_and_nothing_that_stops_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    support::write_models(folder);
    let base = folder.join("base.safetensors");
    let start = Instant::now();
    assert!(merge(folder, "base.safetensors", "merged.safetensors").wait().unwrap().success());
    let whole = start.elapsed();
    let (old, new) = (fs::read(&base).unwrap(), fs::read(folder.join("merged.safetensors")).unwrap());
    assert!(old != new);

    let mut left_old = 0;
    for kill in 0..KILLS {
        let mut child = merge(folder, "base.safetensors", "base.safetensors");
        // Spread over the whole run and a little beyond; the scheduler sees to it that no two are alike.
        thread::sleep(whole.mul_f64(f64::from(kill) / f64::from(KILLS - 2)) + Duration::from_millis(1));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = fs::read(&base).unwrap();
        assert!(found == old || found == new, "kill {kill}: the file is neither the old nor the new one");
        left_old += u32::from(found == old);
        if found == new {
            fs::write(&base, &old).unwrap();
        }
    }
    assert!(left_old > 0, "no kill came before the end");

    assert!(merge(folder, "base.safetensors", "base.safetensors").wait().unwrap().success());
    assert!(fs::read(&base).unwrap() == new);
    assert_eq!(support::names(folder), ["adapter.safetensors", "base.safetensors", "merged.safetensors"]);
}
