//! `lora pull` through the real program, against a hub that listens on this machine: what a person sees, exit codes, what is
//! left behind.
#![cfg(feature = "hub")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../../lora-hub/tests/support/mod.rs"]
mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{COMMIT, FakeHub, NAME, STRANGER, TOKEN};
use tempfile::TempDir;

/// A home folder, and a hub that the program is pointed to.
struct Place {
    hub: FakeHub,
    home: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { hub: FakeHub::language_model(), home: tempfile::tempdir().unwrap() }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
        command.args(line.split_whitespace()).current_dir(self.home.path()).env_clear();
        command.env("HOME", self.home.path()).env("HF_ENDPOINT", &self.hub.endpoint);
        command
    }

    fn run(&self, line: &str) -> Answer {
        Answer::of(self.command(line).output().unwrap())
    }

    fn run_with(&self, line: &str, variables: &[(&str, &str)]) -> Answer {
        Answer::of(self.command(line).envs(variables.iter().copied()).output().unwrap())
    }

    fn cache(&self) -> PathBuf {
        self.home.path().join(".cache/huggingface/hub")
    }

    fn snapshot(&self) -> PathBuf {
        self.cache().join("models--org--name/snapshots").join(COMMIT)
    }

    fn half(&self) -> PathBuf {
        let digits = self.hub.file("model.safetensors").digits();
        self.cache().join(format!("models--org--name/blobs/{digits}.incomplete"))
    }

    /// A failure as a person should see it: exit code, a first line, a hint, no token.
    fn refused(&self, line: &str, variables: &[(&str, &str)], code: i32, parts: &[&str]) -> Answer {
        let answer = self.run_with(line, variables);
        assert_eq!(answer.code, Some(code), "{answer:?}");
        // What was begun may have been said before.
        let error = answer.stderr.lines().position(|line| line.starts_with("error: "));
        assert!(answer.stdout.is_empty() && error.is_some_and(|line| line <= 1), "{answer:?}");
        assert!(answer.stderr.contains("\nhint: ") && answer.stderr.lines().count() <= 12, "{answer:?}");
        for part in parts {
            assert!(answer.stderr.contains(part), "`{part}` is missing: {answer:?}");
        }
        for secret in [TOKEN, STRANGER] {
            assert!(!answer.stderr.contains(secret), "{answer:?}");
        }
        answer
    }
}

#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Answer {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

#[test]
fn the_folder_of_the_model_is_the_answer_and_the_rest_is_talk() {
    let place = Place::new();
    let first = place.run(&format!("pull {NAME}"));
    assert_eq!((first.code, first.stdout.trim_end()), (Some(0), place.snapshot().to_str().unwrap()), "{first:?}");
    assert!(first.stderr.starts_with("fetching org/name: 293 KiB\n"), "{first:?}");
    assert_eq!(
        fs::read(place.snapshot().join("model.safetensors")).unwrap(),
        place.hub.file("model.safetensors").content
    );
    let second = place.run(&format!("pull {NAME} -q"));
    assert_eq!((second.code, &second.stdout, second.stderr.as_str()), (Some(0), &first.stdout, ""));
    let third = place.run(&format!("pull https://huggingface.co/{NAME}"));
    assert_eq!(third.stderr, "org/name: the cache has it all, nothing was fetched\n");
}

#[test]
fn programs_get_one_document() {
    let place = Place::new();
    let planned: Value = serde_json::from_str(&place.run(&format!("pull {NAME} --dry-run --json")).stdout).unwrap();
    assert_eq!(planned["missing"], planned["size"]);
    assert!(!place.cache().exists(), "a dry run has left something");
    let answer = place.run(&format!("pull {NAME} --json"));
    let facts: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!((&facts["model"], &facts["revision"], &facts["commit"]), (&NAME.into(), &"main".into(), &COMMIT.into()));
    assert_eq!((&facts["bytes"], &facts["path"]), (&planned["size"], &place.snapshot().to_str().unwrap().into()));
    assert_eq!(answer.stderr, "");
}

#[test]
fn a_dry_run_lists_what_would_come() {
    let place = Place::new();
    place.hub.rules().cuts = vec![200_000];
    assert_eq!(place.run(&format!("pull {NAME} --retries 0")).code, Some(1));
    let answer = place.run(&format!("pull {NAME} --dry-run"));
    assert!(answer.stdout.contains("   293 KiB  model.safetensors  195 KiB of it are there\n"), "{answer:?}");
    assert!(!answer.stdout.contains("gguf") && !answer.stdout.contains("pytorch_model.bin"), "{answer:?}");
    assert!(
        answer.stdout.ends_with("4 files, 97.7 KiB to fetch\n") || answer.stdout.contains("to fetch"),
        "{answer:?}"
    );
}

#[test]
fn named_files_are_fetched_and_others_are_not() {
    let place = Place::new();
    assert_eq!(place.run(&format!("pull {NAME} README.md")).code, Some(0));
    assert!(place.snapshot().join("README.md").is_file() && !place.snapshot().join("config.json").exists());
    let line = format!("pull {NAME} READNE.md");
    place.refused(&line, &[], 1, &["has no file `READNE.md`", "did you mean `lora pull org/name README.md`?"]);
    place.refused(&format!("pull {NAME} pytorch_model.bin"), &[], 1, &["a pickle, which can run code", "lora convert"]);
}

#[test]
fn gated_models_end_with_4_and_the_page_of_the_licence() {
    let place = Place::new();
    place.hub.rules().gated = true;
    let line = format!("pull {NAME}");
    let page = format!("{}/{NAME}", place.hub.endpoint);
    place.refused(
        &line,
        &[],
        4,
        &["is gated", &page, "export HF_TOKEN=hf_...", "Access to model org/name is restricted."],
    );
    place.refused(
        &line,
        &[("HF_TOKEN", STRANGER)],
        4,
        &["is gated", &page, "the token of the variable HF_TOKEN was sent"],
    );
    let answer = place.run_with(&format!("{line} -vv"), &[("HF_TOKEN", TOKEN)]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(!format!("{answer:?}").contains(TOKEN));
}

#[test]
fn the_token_is_also_taken_from_its_file() {
    for (file, variables) in [
        (".cache/huggingface/token", vec![]),
        ("mine", vec![("HF_TOKEN_PATH", "mine")]),
        ("hf/token", vec![("HF_HOME", "hf")]),
    ] {
        let place = Place::new();
        place.hub.rules().private = true;
        let path = place.home.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("{TOKEN}\n")).unwrap();
        let answer = place.run_with(&format!("pull {NAME}"), &variables);
        assert_eq!(answer.code, Some(0), "{file}: {answer:?}");
        fs::write(&path, "hf_thatranout").unwrap();
        let answer = place.run_with(&format!("pull {NAME}"), &variables);
        assert_eq!(answer.code, Some(4), "{answer:?}");
        assert!(answer.stderr.contains("does not accept the token of the file"), "{answer:?}");
        assert!(!answer.stderr.contains("hf_thatranout"));
    }
}

#[test]
fn what_is_not_there_is_named_and_the_nearest_that_is() {
    let place = Place::new();
    let known = [("HF_TOKEN", TOKEN)];
    place.refused("pull org/nmae", &known, 1, &["there is no model org/nmae", "did you mean `lora pull org/name`?"]);
    place.refused("pull org/nmae", &[], 4, &["asks for a login", "did you mean `lora pull org/name`?"]);
    let line = "pull org/name@v1.1";
    place.refused(line, &[], 1, &["has no revision `v1.1`", "main, v1.0, v2.0", "`lora pull org/name@v1.0`"]);
    place.refused("pull gpt2", &[], 2, &["write ORG/NAME"]);
    place.refused("pull org/name", &[("HF_ENDPOINT", "huggingface.co")], 2, &["unset HF_ENDPOINT"]);
}

#[test]
fn without_a_network_the_cache_is_used_and_nothing_is_asked() {
    let place = Place::new();
    let forbidden: [(&str, &[(&str, &str)]); 3] =
        [(" --offline", &[]), ("", &[("HF_HUB_OFFLINE", "1")]), ("", &[("TRANSFORMERS_OFFLINE", "yes")])];
    for (flag, variables) in forbidden {
        let by = variables.first().map_or("--offline", |(name, _)| name);
        place.refused(&format!("pull {NAME}{flag}"), variables, 1, &["not in the cache", by, "lora pull org/name"]);
    }
    assert!(place.hub.seen().is_empty());
    let fetched = place.run(&format!("pull {NAME}"));
    let asked = place.hub.seen().len();
    for (flag, variables) in forbidden {
        let answer = place.run_with(&format!("pull {NAME}{flag}"), variables);
        assert_eq!((answer.code, &answer.stdout), (Some(0), &fetched.stdout), "{answer:?}");
    }
    assert_eq!(place.hub.seen().len(), asked);
    // Nobody answers: the same, with a warning.
    let gone = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    let answer = place.run_with(&format!("pull {NAME} --retries 0"), &gone);
    assert_eq!((answer.code, &answer.stdout), (Some(0), &fetched.stdout), "{answer:?}");
    assert!(answer.stderr.contains("warning: cannot reach 127.0.0.1:9"), "{answer:?}");
    place.refused("pull org/other --retries 0", &gone, 1, &["cannot reach 127.0.0.1:9", "the cache has no copy"]);
}

#[test]
fn a_lost_connection_keeps_the_half_and_the_same_command_goes_on() {
    let place = Place::new();
    place.hub.rules().cuts = vec![200_000];
    let line = format!("pull {NAME} --retries 0");
    place.refused(
        &line,
        &[],
        1,
        &["model.safetensors is at 195 KiB of 293 KiB", "the same command goes on from there"],
    );
    assert_eq!(fs::metadata(place.half()).unwrap().len(), 200_000);
    let answer = place.run(&line);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(answer.stderr.starts_with("fetching org/name: 97."), "{answer:?}");
    assert_eq!(place.hub.contents().last().unwrap().range.as_deref(), Some("bytes=200000-"));
    assert!(!place.half().exists());
}

#[test]
fn wrong_bytes_are_refused_with_both_hashes() {
    let place = Place::new();
    place.hub.rules().corrupt = true;
    let expected = format!("expected: sha256 {}", place.hub.file("model.safetensors").digits());
    place.refused(&format!("pull {NAME}"), &[], 1, &["model.safetensors", &expected, "seen:"]);
    assert!(!place.half().exists() && !place.snapshot().exists());
}

#[test]
fn a_model_that_does_not_fit_on_the_disk_is_not_begun() {
    let place = Place::new();
    place.hub.rules().claimed = Some(1 << 60);
    place.refused(
        &format!("pull {NAME}"),
        &[],
        1,
        &["does not fit on the disk", "needed: 1048576 TiB", "HF_HUB_CACHE"],
    );
    assert!(place.hub.contents().is_empty() && !place.cache().exists());
}

#[test]
fn errors_are_documents_for_programs() {
    let place = Place::new();
    place.hub.rules().gated = true;
    let answer = place.run(&format!("pull {NAME} --json"));
    let error: Value = serde_json::from_str(&answer.stderr).unwrap();
    assert_eq!((answer.code, &error["error"]["code"]), (Some(4), &"gated".into()));
    assert_eq!(error["error"]["context"]["page"], format!("{}/{NAME}", place.hub.endpoint));
}

/// Starts a download that takes seconds, and waits until a part of it is on the disk.
fn begun(place: &Place) -> Child {
    place.hub.rules().slow = Duration::from_millis(10);
    let mut command = place.command(&format!("pull {NAME}"));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while fs::metadata(place.half()).map_or(0, |half| half.len()) < 20_000 {
        assert!(started.elapsed() < Duration::from_secs(30), "nothing has come");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_a_half_that_is_gone_on_with() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let place = Place::new();
        let child = begun(&place);
        let killed = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let answer = Answer::of(child.wait_with_output().unwrap());
        assert_eq!(answer.code, Some(code), "{answer:?}");
        assert!(answer.stderr.contains("`lora pull org/name` goes on from there"), "{answer:?}");
        let kept = fs::metadata(place.half()).unwrap().len();
        assert!(kept >= 20_000 && !place.snapshot().exists());
        place.hub.rules().slow = Duration::ZERO;
        assert_eq!(place.run(&format!("pull {NAME}")).code, Some(0));
        assert_eq!(place.hub.contents().last().unwrap().range, Some(format!("bytes={kept}-")));
    }
}

#[test]
fn two_programs_at_once_fetch_each_file_once() {
    let place = Place::new();
    let first = begun(&place);
    let mut second =
        place.command(&format!("pull {NAME}")).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(second.stderr.take().unwrap()).lines();
    let waits = lines.any(|line| line.unwrap().contains("model.safetensors: another program fetches it, waiting"));
    assert!(waits);
    for child in [first, second] {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(place.hub.contents().len(), 1);
    assert_eq!(
        fs::read(place.snapshot().join("model.safetensors")).unwrap(),
        place.hub.file("model.safetensors").content
    );
}
