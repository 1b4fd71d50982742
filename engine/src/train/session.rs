//! One session of a run: steps, what is logged of them, checkpoints, samples, and how it ends.

use std::{collections::BTreeMap, path::Path, process::ExitCode, time::Instant};

use lora_cli::{
    Exit, Failure,
    plan::Plan,
    progress::{Progress, StepReport},
    report,
    run::{RunDir, RunError, Validation, write_sample_index},
    text,
    ui::Ui,
};
use lora_torch::{Error as TorchError, Report, Target, Trainer, checkpoint::Checkpoints};
use serde_json::json;

use super::{
    Facts, Family, Known, Prepared, SamplePlace,
    log::{Clock, Log},
    saved,
    settings::{identity, train_options},
    validation::Measured,
};
use crate::{failures::Explain as _, signals::Signals};

/// A run that is being trained.
pub(super) struct Session<F: Family> {
    known: Known,
    family: F,
    plan: Plan,
    run: RunDir,
    ui: Ui,
    trainer: Trainer<F::Objective>,
    prompts: Vec<String>,
    facts: Facts,
    checkpoints: Checkpoints,
    /// What was measured of the examples that are kept apart.
    measured: Measured,
    identity: BTreeMap<String, String>,
    /// Training time of earlier sessions.
    seconds: f64,
    /// What was warned of already, once each.
    warned: Vec<&'static str>,
}

impl<F: Family> Session<F> {
    /// Puts adapters on the objective, ready for the first step.
    ///
    /// # Errors
    /// If the options do not fit, or memory runs out.
    pub(super) fn new(known: Known, prepared: Prepared<F>, plan: Plan, run: RunDir, ui: Ui) -> Result<Self, Failure> {
        let Prepared { family, objective, prompts, facts } = prepared;
        let config = &known.config;
        let options = train_options(config, plan.steps)?;
        let text_rate = config.text_encoder_lr / config.lr;
        let targets = &known.targets;
        let mut select = |projection: &lora_torch::Projection| {
            let component = projection.component()?;
            let rate = if component.is_text_encoder() { text_rate } else { 1.0 };
            targets
                .matches(component, projection.path(), projection.is_conv_with_kernel())
                .then_some(Target { rate, start: None })
        };
        let trainer = Trainer::new(&known.machine.on, objective, &mut select, options).explain()?;
        let identity = identity(config, &facts)?;
        let prompts = if config.sample.is_empty() { prompts } else { config.sample.clone() };
        let keep = if config.keep == 0 { usize::MAX } else { config.keep };
        let checkpoints = Checkpoints::new(run.checkpoints(), keep);
        let (measured, seconds, warned) = (Measured::default(), 0.0, Vec::new());
        Ok(Self {
            plan,
            ui,
            trainer,
            family,
            prompts,
            facts,
            checkpoints,
            measured,
            identity,
            seconds,
            warned,
            run,
            known,
        })
    }

    /// Goes back to the newest sound checkpoint, or to the start if there is none yet.
    ///
    /// # Errors
    /// If it belongs to another run.
    fn resume(&mut self) -> Result<(), Failure> {
        self.checkpoints.sweep().explain()?;
        let Some(resumed) = self.trainer.resume(&self.checkpoints, self.identity.clone()).explain()? else {
            self.ui.say("Resume  no checkpoint yet: from the start");
            return Ok(());
        };
        for (folder, reason) in &resumed.skipped {
            self.ui.warn(&format!("{} passed over: {reason}", folder.display()));
        }
        self.seconds = resumed.extra["seconds"].as_f64().unwrap_or(0.0);
        self.ui.say(&format!("Resume  at step {} of {}", resumed.step, self.plan.steps));
        Ok(())
    }

    /// Trains to the end, or until a signal; with `resume`, from the newest checkpoint on.
    ///
    /// # Errors
    /// What stops the run; the last checkpoint then still stands.
    pub(super) fn run(mut self, resume: bool, signals: &Signals) -> Result<ExitCode, Failure> {
        if resume {
            self.resume()?;
        }
        self.train(signals)
    }

    fn train(mut self, signals: &Signals) -> Result<ExitCode, Failure> {
        let total = self.plan.steps;
        let first = self.trainer.steps_done();
        let mut log = Log::open(&self.run, first, total, self.known.config.log_every.get())?;
        self.measured = Measured::of(&self.run.metrics())?;
        let mut progress = Progress::new(self.ui, first, total);
        progress.event("start", &json!({"run": self.run.root(), "step": first, "steps": total}));
        let mut clock = Clock::start(self.seconds);
        while !self.trainer.is_finished() {
            let reports = match self.trainer.step() {
                Ok(reports) => reports,
                Err(error) => return Err(self.stopped_by(error, &mut progress, &clock)),
            };
            let step = self.trainer.steps_done();
            if step == first + 1 {
                progress.note(&format!("First step after {:.1} s", self.known.started.elapsed().as_secs_f64()));
            }
            self.log(&reports, &mut log, &mut progress, &clock);
            if step == 1 {
                // The base alone, without what the first step learnt.
                self.validate(0, &mut log, &mut progress, &mut clock)?;
                clock.pause(|| self.draw(0, &mut log, &progress));
            }
            if let Some(exit) = signals.stop() {
                return self.interrupted(exit, &mut log, progress, &clock);
            }
            let due = |every: Option<u64>| every.is_some_and(|every| step.is_multiple_of(every)) && step < total;
            if due(self.plan.validate_every) {
                self.validate(step, &mut log, &mut progress, &mut clock)?; // first: a checkpoint then stands behind it
            }
            if due(self.plan.save_every) || signals.take_save() {
                self.save(&progress, &clock);
            }
            if due(self.plan.sample_every) {
                clock.pause(|| {
                    self.draw(step, &mut log, &progress);
                    self.report();
                });
            }
        }
        let rest = self.trainer.finish().explain()?;
        self.log(&rest, &mut log, &mut progress, &clock);
        self.validate(total, &mut log, &mut progress, &mut clock)?;
        self.finish(&mut log, progress, &clock)
    }

    /// The last checkpoint, the adapter, the last samples and the report.
    fn finish(mut self, log: &mut Log, progress: Progress, clock: &Clock) -> Result<ExitCode, Failure> {
        let total = self.plan.steps;
        self.save(&progress, clock);
        let file = saved::adapter_in(self.run.root(), &self.known.config);
        self.write_adapter(&file)?;
        self.family.finish(self.run.root(), &self.known, &self.plan)?;
        let loss = progress.loss();
        self.draw(total, log, &progress);
        let validation_loss = self.measured.last().map(|last| last.validation_loss);
        let done = json!({
            "adapter": file, "report": self.run.report(), "loss": loss, "validation_loss": validation_loss
        });
        progress.event("done", &done);
        progress.finish();
        let seconds = clock.seconds();
        let loss = loss.map_or_else(String::new, |loss| format!(" · loss {loss:.4}"));
        let validation = validation_loss.map_or_else(String::new, |loss| format!(" · validation loss {loss:.4}"));
        self.ui.say(&format!(
            "Done    {} in {}{loss}{validation}",
            text::plural(total, "step"),
            text::duration(seconds)
        ));
        if let Some(advice) = self.measured.advice() {
            self.ui.say(&format!("        {advice}"));
        }
        self.ui.say(&saved::how_to_use(&file, &self.known.config, self.prompts.first()));
        self.run.release();
        self.report();
        self.ui.say(&format!("Report  {}", self.run.report().display()));
        if !self.ui.json {
            self.ui.data(&file.display().to_string()).map_err(|error| Failure::from_error("stdout", &error))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// A signal asked for the end: everything is saved, and the way back is said.
    fn interrupted(
        mut self,
        exit: Exit,
        log: &mut Log,
        mut progress: Progress,
        clock: &Clock,
    ) -> Result<ExitCode, Failure> {
        let rest = self.trainer.finish().explain()?;
        self.log(&rest, log, &mut progress, clock);
        let step = self.trainer.steps_done();
        let saved = self.try_save(clock);
        progress.event("stopped", &json!({"step": step, "saved": saved.is_ok(), "resume": self.resume_command()}));
        progress.finish();
        saved?;
        self.run.release();
        self.report();
        self.ui.say(&format!("Stopped after step {step}, everything is saved"));
        self.ui.say(&format!("Go on   {}", self.resume_command()));
        Ok(exit.into())
    }

    /// Numbers that are not finite, a full memory, a lost device: the last finite state is kept if it can be.
    fn stopped_by(&mut self, error: TorchError, progress: &mut Progress, clock: &Clock) -> Failure {
        if matches!(error, TorchError::NotFinite { .. }) {
            self.save(progress, clock);
        }
        let failure = match Err::<(), _>(error).explain() {
            Err(failure) => failure,
            Ok(()) => Failure::new("training", "the training stopped"),
        };
        failure.detail(format!("checkpoints are in {}", self.run.checkpoints().display()))
    }

    fn log(&mut self, reports: &[Report], log: &mut Log, progress: &mut Progress, clock: &Clock) {
        for report in reports {
            if !report.applied {
                progress
                    .warn(&format!("step {} was not applied: loss or gradient is not a finite number", report.step));
            }
            let shown =
                StepReport { step: report.step, loss: report.loss, lr: report.rate, grad_norm: report.gradient_norm };
            progress.step(&shown);
            if let Err(error) = log.step(report, clock.seconds()) {
                self.warn_once("log", progress, &error.to_string());
            }
        }
    }

    /// Saves a checkpoint; a full disk is warned of and does not stop the training.
    fn save(&mut self, progress: &Progress, clock: &Clock) {
        let before = Instant::now();
        match self.try_save(clock) {
            Ok(()) => {
                let step = self.trainer.steps_done();
                progress.event("checkpoint", &json!({"step": step, "folder": self.run.checkpoint_at(step)}));
                if self.ui.verbose > 0 || self.ui.bars {
                    progress.note(&format!(" saved step {step} ({:.1} s)", before.elapsed().as_secs_f64()));
                }
            }
            Err(failure) => {
                let details = failure.details.join(": ");
                progress.warn(&format!("checkpoint not saved, training goes on: {failure}: {details}"));
            }
        }
    }

    fn try_save(&self, clock: &Clock) -> Result<(), Failure> {
        let extra = json!({"seconds": clock.seconds(), "lora": env!("CARGO_PKG_VERSION")});
        let mut refused = None;
        let saved = self.trainer.save(&self.checkpoints, self.identity.clone(), extra, |folder| {
            self.write_adapter(&saved::adapter_in(folder, &self.known.config)).map_err(|failure| {
                refused = Some(failure);
                TorchError::Config { option: "format", reason: "the adapter could not be written".to_owned() }
            })
        });
        match refused {
            Some(failure) => Err(failure),
            None => saved.map(drop).explain(),
        }
    }

    fn write_adapter(&self, path: &Path) -> Result<(), Failure> {
        let adapters = self.trainer.adapters(true).explain()?;
        let Self { known, family, facts, plan, .. } = self;
        let metadata = match known.config.no_metadata {
            true => BTreeMap::new(),
            false => family.metadata(known, facts, plan, self.trainer.steps_done()),
        };
        saved::write_adapter(path, &adapters, known, family.base(), &metadata, F::DTYPE)
    }

    /// Measures the loss of the examples that are kept apart, after `step` steps, unless that was done before. What goes
    /// wrong in the measurement never stops the training.
    ///
    /// # Errors
    /// Those of the steps that are on their way: their lines come before this one.
    fn validate(
        &mut self,
        step: u64,
        log: &mut Log,
        progress: &mut Progress,
        clock: &mut Clock,
    ) -> Result<(), Failure> {
        if self.plan.validate_every.is_none() || self.measured.last().is_some_and(|last| last.step == step) {
            return Ok(());
        }
        match self.trainer.finish() {
            Ok(rest) => self.log(&rest, log, progress, clock),
            Err(error) => return Err(self.stopped_by(error, progress, clock)),
        }
        let seconds = clock.seconds();
        let mut result = Ok(None);
        clock.pause(|| result = self.try_validate(step));
        match result {
            Ok(Some(validation_loss)) => {
                let measured = Validation { step, validation_loss, seconds };
                self.measured.add(measured);
                progress.validation(step, validation_loss);
                if let Err(error) = log.validation(&measured) {
                    self.warn_once("log", progress, &error.to_string());
                }
            }
            Ok(None) => {}
            Err(failure) => progress.warn(&format!("validation of step {step} skipped, training goes on: {failure}")),
        }
        Ok(())
    }

    fn try_validate(&mut self, step: u64) -> Result<Option<f64>, Failure> {
        let Self { trainer, family, known, .. } = self;
        let mut measured = Ok(None);
        let mut work = |objective: &mut F::Objective| measured = family.validate(objective, known);
        match step {
            0 => tch::no_grad(|| work(trainer.objective())),
            _ => trainer
                .with_adapters(true, |objective| {
                    work(objective);
                    Ok(())
                })
                .explain()?,
        }
        measured
    }

    /// Draws the prompts with the adapter as it is now. What goes wrong here never stops the training.
    fn draw(&mut self, step: u64, log: &mut Log, progress: &Progress) {
        if self.plan.sample_every.is_none() {
            return;
        }
        match self.try_draw(step, log) {
            Ok(folder) => {
                progress.event("samples", &json!({"step": step, "folder": folder}));
                if self.ui.bars {
                    progress.note(&format!(" samples of step {step} in {}", folder.display()));
                }
            }
            Err(failure) => progress.warn(&format!("samples of step {step} skipped, training goes on: {failure}")),
        }
    }

    fn try_draw(&mut self, step: u64, log: &mut Log) -> Result<std::path::PathBuf, Failure> {
        let folder = self.run.samples_at(step);
        std::fs::create_dir_all(&folder).map_err(|source| RunError::Write { path: folder.clone(), source })?;
        let Self { trainer, family, known, prompts, .. } = self;
        let mut samples = Ok(Vec::new());
        let mut work = |objective: &mut F::Objective| {
            let place = SamplePlace { step, folder: &folder, events: &mut log.events };
            samples = family.sample(objective, known, prompts, place);
        };
        match step {
            0 => work(trainer.objective()),
            _ => trainer
                .with_adapters(true, |objective| {
                    work(objective);
                    Ok(())
                })
                .explain()?,
        }
        write_sample_index(&folder, &samples?)?;
        Ok(folder)
    }

    /// Writes the page anew; one that cannot be written costs a look, not the run.
    fn report(&self) {
        if let Err(error) = report::write(&self.run) {
            self.ui.warn(&format!("report not written: {error}"));
        }
    }

    fn warn_once(&mut self, what: &'static str, progress: &Progress, line: &str) {
        if !self.warned.contains(&what) {
            self.warned.push(what);
            progress.warn(&format!("{line}; training goes on without"));
        }
    }

    fn resume_command(&self) -> String {
        format!("lora train --resume {}", self.run.root().display())
    }
}
