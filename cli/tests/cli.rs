//! The real program in fresh folders: help screens, errors, layers, runs, and how it starts the engine.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

/// A folder in which the program runs as if nothing else were on the machine.
struct Place {
    folder: TempDir,
    program: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        Self { folder, program: env!("CARGO_BIN_EXE_lora").into() }
    }

    /// The program copied away from its working copy, so that it finds neither engine nor libtorch by itself.
    fn alone() -> Self {
        let mut place = Self::new();
        let bin = place.folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        place.program = executable(&place.program, bin.join("lora"));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("work").join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(line.split_whitespace()).current_dir(self.path("")).env_clear();
        command.env("HOME", self.folder.path().join("home")).env("PATH", "/usr/bin:/bin");
        command
    }

    fn run(&self, line: &str) -> Answer {
        Answer::of(self.command(line).output().unwrap(), self.folder.path())
    }
}

/// A copy that can be started. Another process writes it: a descriptor of ours, open for writing, would pass to whatever
/// another test starts in that moment, and a file that is open for writing cannot be run.
fn executable(from: &Path, to: PathBuf) -> PathBuf {
    let copied = Command::new("install").args(["-m", "755"]).arg(from).arg(&to).status().unwrap();
    assert!(copied.success());
    to
}

/// What came back, with the folder's random name replaced.
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Answer {
    fn of(output: Output, folder: &Path) -> Self {
        let real = folder.canonicalize().unwrap();
        let text = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).unwrap();
            text.replace(real.to_str().unwrap(), "[HERE]").replace(folder.to_str().unwrap(), "[HERE]")
        };
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Exit code and both streams in one text, as a person sees them.
    fn seen(&self) -> String {
        let part = |name: &str, text: &str| if text.is_empty() { String::new() } else { format!("--- {name}\n{text}") };
        format!("exit {}\n{}{}", self.code.unwrap(), part("stdout", &self.stdout), part("stderr", &self.stderr))
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

const COMMANDS: [&str; 29] = [
    "",
    "train",
    "generate",
    "eval",
    "data",
    "data check",
    "data preview",
    "pull",
    "inspect",
    "check",
    "convert",
    "metadata",
    "merge",
    "mix",
    "extract",
    "resize",
    "diff",
    "runs",
    "runs list",
    "runs show",
    "runs compare",
    "report",
    "doctor",
    "config",
    "config show",
    "config init",
    "config explain",
    "config import",
    "completions",
];

#[test]
fn every_help_fits_a_screen_of_eighty_by_forty() {
    let place = Place::new();
    for command in COMMANDS {
        let help = place.run(&format!("{command} --help"));
        assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""), "{command}");
        let lines: Vec<_> = help.stdout.lines().collect();
        assert!(lines.len() <= 40, "`{command}` takes {} lines:\n{}", lines.len(), help.stdout);
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "`{command}` is too wide:\n{}", help.stdout);
    }
}

#[test]
fn all_options_are_one_flag_further() {
    let place = Place::new();
    let (usual, all) = (place.run("train --help").stdout, place.run("train --help-all").stdout);
    for flag in ["--min-snr", "--optimizer", "--text-encoder-lr", "--offline"] {
        assert!(!usual.contains(flag) && all.contains(flag), "{flag}");
    }
}

#[test]
fn the_help_of_train() {
    insta::assert_snapshot!(Place::new().run("train --help").stdout, @"
    Train an adapter on pictures or texts, or go on with a run

    Usage: lora train [OPTIONS] [DATA]

    Arguments:
      [DATA]  Folder of captioned pictures, or file of texts (.jsonl, .json, .txt)

    Options:
          --base <BASE>          Base model: folder, .safetensors file or org/name
          --out <RUN>            Folder of the run [default: runs/NAME-1, -2, ...]
          --preset <PRESET>      Set of defaults to start from [default: balanced;
                                 language for a language model]
          --trigger <WORD>       Pictures: word that calls up the style; put before
                                 every caption
          --rank <N>             Width of the update: capacity and file size
                                 [default: 16]
          --lr <RATE>            Learning rate [default: 1e-4; 2e-4 for a language
                                 model]
          --steps <N>            Length of the run [default: about 4000 pictures'
                                 worth, or 3 passes over texts]
          --batch <N>            Examples per step [default: 4]
          --resolution <PIXELS>  Side of the pictures in pixels [default: the base's
                                 own]
          --sample <PROMPT>      Prompt to draw or answer while training; repeatable
          --device <DEVICE>      auto, cpu, cuda or cuda:N [default: auto]
          --resume <RUN>         Go on with the run in this folder; needs nothing
                                 else
          --dry-run              Say what would be done, and stop

    Global:
          --config <FILE>  Configuration file
          --json           Answer in JSON
      -h, --help           Show the usual options
          --help-all       Show all options
    ");
}

#[test]
fn the_help_of_the_program() {
    insta::assert_snapshot!(Place::new().run("--help").stdout, @"
    Train, inspect and use low-rank adapters: Stable Diffusion, language models

    Usage: lora [OPTIONS] <COMMAND>

    Commands:
      train        Train an adapter on pictures or texts, or go on with a run
      generate     Draw pictures from a prompt, or answer it, by the base
      chat         Talk with a language model
      eval         Measure the loss on pictures or texts
      data         Look at what would be trained on
      pull         Fetch a model from the Hugging Face hub
      inspect      Say what an adapter file is
      check        Check an adapter file against a base, key by key
      convert      Write an adapter in another spelling, or a pickle as safetensors
      merge        Merge adapters into a base model
      metadata     Show or change what a file says about itself
      mix          Mix several adapters into one
      extract      Take an adapter out of two models
      resize       Give an adapter another rank
      diff         Compare two adapters
      runs         List, show and compare runs
      report       Write the report of a run anew
      doctor       Explain the installation, and what is wrong with it
      config       Show, explain and start configurations
      completions  Print the completions of a shell
      man          Print the manual page

    Options:
      -V, --version  Print version

    Global:
          --config <FILE>  Configuration file
          --json           Answer in JSON
      -h, --help           Show the usual options
          --help-all       Show all options

    First run: lora train ./pictures --base BASE      Trouble: lora doctor
    ");
}

#[test]
fn a_misspelt_flag_has_a_suggestion() {
    insta::assert_snapshot!(Place::new().run("train pictures --base b --rnak 3").seen(), @"
    exit 2
    --- stderr
    error: unexpected argument `--rnak` found

    hint: a similar argument exists: `--rank`; `lora train --help` shows what it takes
    ");
}

#[test]
fn a_value_from_a_variable_is_blamed_on_the_variable() {
    let place = Place::new();
    let output = place.command("train pictures --base b").env("LORA_RANK", "many").output().unwrap();
    insta::assert_snapshot!(Answer::of(output, place.folder.path()).seen(), @"
    exit 2
    --- stderr
    error: invalid value `many` for `--rank <N>`: a whole number is expected
      the value comes from the variable LORA_RANK

    hint: `lora train --help` shows what it takes
    ");
}

#[test]
fn a_misspelt_variable_is_noticed() {
    let place = Place::alone();
    let output =
        place.command("train pictures --base b").env("LORA_RNAK", "3").env("LORA_HOME", "/x").output().unwrap();
    let answer = Answer::of(output, place.folder.path());
    let first = answer.stderr.lines().next();
    assert_eq!(first, Some("warning: the variable LORA_RNAK means nothing here; did you mean LORA_RANK?"));
    assert_eq!(answer.stderr.matches("warning:").count(), 1, "{}", answer.stderr);
}

#[test]
fn training_needs_data_and_a_base() {
    let place = Place::new();
    insta::assert_snapshot!(place.run("train").seen(), @"
    exit 2
    --- stderr
    error: `DATA` is missing

    hint: for example `lora train ./pictures --base BASE`
    ");
    insta::assert_snapshot!(place.run("train pictures").seen(), @"
    exit 2
    --- stderr
    error: `--base` is missing

    hint: for example `lora train ./pictures --base BASE`
    ");
}

#[test]
fn a_number_out_of_range_is_explained() {
    insta::assert_snapshot!(Place::new().run("train pictures --base b --caption-dropout 5").seen(), @"
    exit 2
    --- stderr
    error: `--caption-dropout` is 5
      it is a share, 0 to 1

    hint: what it may be: `lora config explain caption-dropout`
    ");
}

#[test]
fn a_misspelt_key_is_named_with_its_place() {
    let place = Place::new();
    place.write("my.toml", "rank = 8\n\nlearning_rte = 1e-4\n");
    insta::assert_snapshot!(place.run("train pictures --base b --config my.toml").seen(), @"
    exit 2
    --- stderr
    error: unknown key `learning_rte` in my.toml:3:1

    hint: did you mean `lr`? see `lora config explain lr`
    ");
    place.write("lora.toml", "rank = \"big\"\n");
    insta::assert_snapshot!(place.run("train pictures --base b").seen(), @r#"
    exit 2
    --- stderr
    error: bad value of `rank` in [HERE]/work/lora.toml:1:8
      invalid type: string "big", expected a whole number above 0

    hint: what it may be: `lora config explain rank`
    "#);
    place.write("lora.toml", "rank = = 3\n");
    insta::assert_snapshot!(place.run("config show").seen(), @"
    exit 2
    --- stderr
    error: extra `=`, expected nothing in [HERE]/work/lora.toml:1:8

    hint: a configuration file is TOML: `lora config init` writes one with every option
    ");
    insta::assert_snapshot!(place.run("config show --config gone.toml").seen(), @"
    exit 2
    --- stderr
    error: cannot read the configuration gone.toml
      No such file or directory (os error 2)

    hint: name another file, or start this one with `lora config init gone.toml`
    ");
}

#[test]
fn errors_for_programs_are_json_on_stderr() {
    let place = Place::new();
    place.write("lora.toml", "rnak = 3\n");
    let answer = place.run("train pictures --base b --json");
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    let error: Value = serde_json::from_str(&answer.stderr).unwrap();
    let error = &error["error"];
    assert_eq!(error["code"], "config_unknown_key");
    assert_eq!(error["context"]["suggestion"], "rank");
    assert_eq!(error["context"]["line"], 1);
    assert!(error["message"].is_string() && error["hint"].is_string());
    let answer = place.run("train --json --rnak 3");
    let error: Value = serde_json::from_str(&answer.stderr).unwrap();
    assert_eq!((answer.code, &error["error"]["code"]), (Some(2), &Value::from("usage")));
}

#[test]
fn every_layer_speaks_in_its_turn() {
    let place = Place::new();
    let home = place.folder.path().join("home/.config/lora");
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join("config.toml"), "seed = 1\nkeep = 9\nbatch = 1\nlr = 1\nrank = 1\n").unwrap();
    place.write("lora.toml", "batch = 2\nlr = 2\nrank = 2\n");
    place.write("given.toml", "lr = 3\nrank = 3\n");
    fs::create_dir_all(place.path("deep/er")).unwrap();
    let mut command = place.command("config show --json --config ../../given.toml --alpha 5 --preset demo-style");
    let output =
        command.current_dir(place.path("deep/er")).env("LORA_RANK", "4").env("LORA_ALPHA", "4").output().unwrap();
    let answer = Answer::of(output, place.folder.path());
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    let shown = answer.json();
    for (key, value, origin) in [
        ("alpha", Value::from(5.0), "flag"),
        ("rank", 4.into(), "variable LORA_RANK"),
        ("lr", 3.0.into(), "../../given.toml:1"),
        ("batch", 2.into(), "[HERE]/work/lora.toml:1"),
        ("keep", 9.into(), "[HERE]/home/.config/lora/config.toml:2"),
        ("steps", 800.into(), "preset demo-style"),
        ("ema", 0.0.into(), "default"),
    ] {
        assert_eq!((&shown[key]["value"], shown[key]["origin"].as_str()), (&value, Some(origin)), "{key}");
    }
}

#[test]
fn options_can_be_shown_and_explained() {
    let place = Place::new();
    let shown = place.run("config show --rank 3").stdout;
    assert!(shown.contains("rank = 3                                 # flag"), "{shown}");
    // What is shown is a configuration file.
    toml::from_str::<toml::Table>(&shown).unwrap();
    insta::assert_snapshot!(place.run("config explain min_snr").seen(), @"
    exit 0
    --- stdout
    min-snr
      Cap of the signal-to-noise weight of the loss; 0 weighs all alike [default:
      5]
      Hang et al. 2023, arXiv 2303.09556.
      flag      --min-snr
      variable  LORA_MIN_SNR
      file      min-snr = …
      presets   balanced 5.0, demo-style 0.0
      now       5.0 (preset balanced)
    ");
    insta::assert_snapshot!(place.run("config explain generate.sampler").seen(), @"
    exit 0
    --- stdout
    generate.sampler
      How the picture is drawn [default: ddim]
      flag      --sampler
      variable  LORA_GENERATE_SAMPLER
      file      sampler = … under [generate]
      values    ddim, euler, euler-a, dpm++2m, dpm++2m-karras
      now       not set (default)
    ");
    insta::assert_snapshot!(place.run("config explain network_dim").seen(), @"
    exit 2
    --- stderr
    error: there is no option `network_dim`

    hint: did you mean `rank`? `lora config explain rank`
    ");
}

#[test]
fn a_started_configuration_says_nothing_until_it_is_edited_and_is_never_overwritten() {
    let place = Place::new();
    let before = place.run("config show").stdout;
    assert_eq!(place.run("config init").seen(), "exit 0\n--- stdout\nlora.toml\n");
    assert_eq!(place.run("config show").stdout, before);
    insta::assert_snapshot!(place.run("config init").seen(), @"
    exit 1
    --- stderr
    error: lora.toml is there already

    hint: name another file: `lora config init other.toml`
    ");
}

#[test]
fn nothing_is_coloured_without_a_terminal() {
    let place = Place::new();
    for line in ["doctor", "train", "config show", "--help"] {
        let answer = place.run(line);
        assert!(!answer.seen().contains('\u{1b}'), "{line}");
    }
}

#[test]
fn completions_and_the_manual_know_every_command() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.run(&format!("completions {shell}")).stdout;
        assert!(script.contains("caption-dropout") && script.contains("inspect"), "{shell}");
    }
    let page = place.run("man").stdout;
    assert!(page.contains(".SH LORA TRAIN") && page.contains("caption\\-dropout"));
}

#[test]
fn a_missing_engine_is_explained() {
    insta::assert_snapshot!(Place::alone().run("train pictures --base b").seen(), @"
    exit 1
    --- stderr
    error: `lora-engine` is missing: training and drawing need it
      looked for [HERE]/bin/lora-engine

    hint: install both programs into one folder; in a working copy: `cargo xtask setup && cargo build --release`
    ");
}

#[cfg(unix)]
mod engine {
    use super::*;

    /// An engine that says what it was started with.
    fn with_engine() -> Place {
        let place = Place::alone();
        let script = place.write("engine.sh", "#!/bin/sh\necho \"$LD_LIBRARY_PATH\"\necho \"$@\"\nexit 7\n");
        executable(&script, place.folder.path().join("bin/lora-engine"));
        place
    }

    fn libtorch(at: &Path) {
        fs::create_dir_all(at.join("torch/lib")).unwrap();
        fs::write(at.join("torch/lib/libtorch_cpu.so"), "").unwrap();
        fs::create_dir_all(at.join("nvidia/cu13/lib")).unwrap();
    }

    #[test]
    fn a_missing_libtorch_is_explained() {
        let place = with_engine();
        let output = place.command("train pictures --base b").env("LIBTORCH", "/nowhere").output().unwrap();
        insta::assert_snapshot!(Answer::of(output, place.folder.path()).seen(), @"
        exit 1
        --- stderr
        error: libtorch 2.11.0 is missing: training and drawing need it
          the variable LIBTORCH: no libtorch_cpu.so in /nowhere/lib
          beside the program: no libtorch_cpu.so in [HERE]/bin/lib
          the cache: no libtorch_cpu.so in [HERE]/home/.cache/lora/libtorch-2.11.0/torch/lib

        hint: in a working copy `cargo xtask setup` fetches it; else set LIBTORCH to the folder that holds its `lib`. `lora doctor` says more
        ");
    }

    #[test]
    fn the_engine_gets_the_words_the_libraries_and_gives_the_exit_code() {
        let place = with_engine();
        libtorch(&place.folder.path().join("home/.cache/lora/libtorch-2.11.0"));
        let answer = place.run("train pictures --base b --sample x");
        assert_eq!(answer.code, Some(7), "{}", answer.stderr);
        assert_eq!(
            answer.stdout,
            "[HERE]/home/.cache/lora/libtorch-2.11.0/torch/lib:[HERE]/home/.cache/lora/libtorch-2.11.0/nvidia/cu13/lib\n\
             train pictures --base b --sample x\n"
        );
    }

    #[test]
    fn a_libtorch_that_was_named_comes_before_the_cache_and_what_was_in_the_path_comes_last() {
        let place = with_engine();
        libtorch(&place.folder.path().join("home/.cache/lora/libtorch-2.11.0"));
        libtorch(&place.folder.path().join("mine"));
        let mut command = place.command("train pictures --base b");
        command.env("LIBTORCH", place.folder.path().join("mine/torch")).env("LD_LIBRARY_PATH", "/before");
        let answer = Answer::of(command.output().unwrap(), place.folder.path());
        assert!(
            answer.stdout.starts_with("[HERE]/mine/torch/lib:[HERE]/mine/nvidia/cu13/lib:/before\n"),
            "{}",
            answer.stdout
        );
    }

    #[test]
    fn a_wrong_command_line_does_not_start_the_engine() {
        let place = with_engine();
        libtorch(&place.folder.path().join("home/.cache/lora/libtorch-2.11.0"));
        let answer = place.run("train pictures --base b --lr 0");
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    }

    #[test]
    fn doctor_says_what_is_missing_and_fails() {
        let place = with_engine();
        let answer = place.run("doctor");
        assert_eq!(answer.code, Some(1));
        assert!(
            answer.stdout.contains("fail  libtorch") && answer.stdout.contains("cargo xtask setup"),
            "{}",
            answer.stdout
        );
        let findings = place.run("doctor --json").json();
        assert_eq!(findings["ok"], false);
        assert!(findings["findings"].as_array().unwrap().iter().any(|finding| finding["state"] == "fail"));
    }
}
