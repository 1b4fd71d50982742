//! `cargo xtask fuzz [TARGET] [SECONDS]`: runs the fuzz targets one after the other.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::shell;

/// The task: `TARGET` alone, or every file in `fuzz/fuzz_targets`; a minute each unless told otherwise.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let folder = shell::root()?.join("fuzz/fuzz_targets");
    let entries =
        fs::read_dir(&folder).with_context(|| format!("there are no fuzz targets in {}", folder.display()))?;
    let mut targets: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_string_lossy().into_owned())).collect();
    targets.sort_unstable();
    let mut seconds = 60_u32;
    for argument in arguments {
        if let Ok(number) = argument.parse() {
            seconds = number;
        } else if targets.contains(argument) {
            targets = vec![argument.clone()];
        } else {
            bail!("there is no fuzz target `{argument}`; there are: {}", targets.join(", "));
        }
    }
    for target in targets {
        let limit = format!("-max_total_time={seconds}");
        shell::run(shell::command("cargo")?.args(["+nightly", "fuzz", "run", &target, "--", &limit]))
            .context("fuzzing needs a nightly toolchain and `cargo install cargo-fuzz`")?;
    }
    Ok(())
}
