//! `lora report`: writes a run's `report.html` anew.

use crate::{Failure, args::ReportArgs, commands::output, report, run::RunDir, ui::Ui};

pub(crate) fn run(args: &ReportArgs, ui: &Ui) -> Result<(), Failure> {
    let run = RunDir::open(&args.run)?;
    report::write(&run)?;
    let path = run.report();
    match ui.json {
        true => ui.json_data(&serde_json::json!({ "report": path.to_string_lossy() })),
        false => ui.data(&path.display().to_string()),
    }
    .map_err(output)
}
