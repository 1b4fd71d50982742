//! Where a result goes: never over what is read and stays, never over what is no file, and nothing of it is left by a run
//! that is stopped.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    os::unix::{fs::FileTypeExt as _, process::ExitStatusExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;
use support::{formats, lora};

fn copied(folder: &Path) {
    let base = "bases/sd15/unet.safetensors";
    fs::copy(formats().join("kohya_sd15_linear/adapter.safetensors"), folder.join("a.safetensors")).unwrap();
    fs::copy(formats().join(base), folder.join("base.safetensors")).unwrap();
}

#[test]
fn what_is_read_beside_the_base_is_not_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    copied(folder);
    fs::copy(folder.join("base.safetensors"), folder.join("tuned.safetensors")).unwrap();
    fs::create_dir(folder.join("model")).unwrap();
    fs::copy(folder.join("base.safetensors"), folder.join("model/unet.safetensors")).unwrap();
    let merge = "merge --base base.safetensors --lora a.safetensors --allow-unmatched --out";
    for (line, read) in [
        (format!("{merge} a.safetensors"), "a.safetensors"),
        (format!("{merge} ./a.safetensors"), "a.safetensors"),
        (
            "extract --base base.safetensors --tuned tuned.safetensors --rank 4 --out tuned.safetensors".into(),
            "tuned.safetensors",
        ),
        (
            "extract --base model/unet.safetensors --tuned tuned.safetensors --rank 4 --out model/unet.safetensors"
                .into(),
            "model/unet.safetensors",
        ),
        ("convert a.safetensors base.safetensors --to kohya --base base.safetensors".into(), "base.safetensors"),
    ] {
        let before = fs::read(folder.join(read)).unwrap();
        let (code, _, talk) = lora(folder, &line);
        assert_eq!(code, 2, "{line}: {talk}");
        assert!(talk.contains("would take the place of what is read") && talk.contains(read), "{line}: {talk}");
        assert!(fs::read(folder.join(read)).unwrap() == before, "{line}");
    }
    // Over the base itself is what people ask for.
    assert_eq!(lora(folder, &format!("{merge} base.safetensors")).0, 0);
}

#[test]
fn a_pipe_is_no_place_for_a_result() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    copied(folder);
    assert!(Command::new("mkfifo").arg(folder.join("pipe")).status().unwrap().success());
    for line in [
        "convert a.safetensors pipe --to diffusers",
        "resize a.safetensors pipe --rank 1",
        "metadata a.safetensors --set x=y --out pipe",
        "merge --base base.safetensors --lora a.safetensors --allow-unmatched --out pipe",
    ] {
        let (code, _, talk) = lora(folder, line);
        assert_eq!(code, 1, "{line}: {talk}");
        assert!(talk.contains("a device or a pipe"), "{line}: {talk}");
        assert!(fs::metadata(folder.join("pipe")).unwrap().file_type().is_fifo(), "{line}");
    }
}

#[test]
fn a_stopped_run_leaves_nothing_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    support::write_models(folder);
    let line = "merge -q --json --base base.safetensors --lora adapter.safetensors --out merged.safetensors";
    let mut stopped = 0;
    for pause in 0..30 {
        for (signal, expected) in [("-INT", 130), ("-TERM", 143)] {
            let child = support::command(folder)
                .args(line.split_whitespace())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_millis(pause * 4));
            Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
            let output = child.wait_with_output().unwrap();
            let talk = String::from_utf8(output.stderr).unwrap();
            match output.status.code() {
                Some(0) => fs::remove_file(folder.join("merged.safetensors")).unwrap(),
                Some(code) => {
                    assert_eq!(code, expected, "{talk}");
                    let failure: Value = serde_json::from_str(&talk).unwrap();
                    assert_eq!(failure["error"]["code"], "interrupted");
                    let message = failure["error"]["message"].as_str().unwrap();
                    stopped += u32::from(message.contains("nothing is written"));
                    // It came after the end, and does not say that nothing is written.
                    if message == "interrupted" {
                        let _ = fs::remove_file(folder.join("merged.safetensors"));
                    }
                }
                // Before the program could listen.
                None => assert!(output.status.signal().is_some()),
            }
            assert_eq!(support::names(folder), ["adapter.safetensors", "base.safetensors"]);
        }
    }
    assert!(stopped > 0, "no signal came in time");
}
