//! `cargo xtask fuzz [TARGET] [SECONDS]`: runs the fuzz targets one after the other, from the seeds in the repository.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::shell;

/// Seconds of a smoke test, shared by all targets.
const SMOKE: u32 = 60;

/// Bytes of the longest input, a limit for what one allocation may take, and one for the time of an input: none of them is
/// near what a reader needs for so short a file.
const LIMITS: [&str; 4] = ["-max_len=4096", "-malloc_limit_mb=256", "-rss_limit_mb=2048", "-timeout=20"];

/// The task: `TARGET` alone, or every file in `fuzz/fuzz_targets`; a minute in all unless `SECONDS` a target are asked for.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let fuzz = shell::root()?.join("fuzz");
    let folder = fuzz.join("fuzz_targets");
    let entries =
        fs::read_dir(&folder).with_context(|| format!("there are no fuzz targets in {}", folder.display()))?;
    let mut targets: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_string_lossy().into_owned())).collect();
    targets.sort_unstable();
    let mut seconds = None;
    for argument in arguments {
        if let Ok(number) = argument.parse::<u32>() {
            seconds = Some(number);
        } else if targets.contains(argument) {
            targets = vec![argument.clone()];
        } else {
            bail!("there is no fuzz target `{argument}`; there are: {}", targets.join(", "));
        }
    }
    let share = SMOKE / u32::try_from(targets.len().max(1)).unwrap_or(SMOKE);
    let time = format!("-max_total_time={}", seconds.unwrap_or(share).max(1));
    for target in targets {
        // What is found goes into the first folder, which is nobody's but this machine's.
        let (corpus, seeds) = (fuzz.join("corpus").join(&target), fuzz.join("seeds").join(&target));
        fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
        let mut command = shell::command("cargo")?;
        command.args(["+nightly", "fuzz", "run", &target]).args([corpus, seeds]).arg("--").arg(&time).args(LIMITS);
        shell::run(&mut command).context("fuzzing needs a nightly toolchain and `cargo install cargo-fuzz`")?;
    }
    Ok(())
}
