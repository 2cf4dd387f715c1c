//! What rank 0 keeps of a run: rows, lines, samples and checkpoints.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::Tensor;

use super::evaluation::Sums;
use super::learner::{Learner, Update};
use super::speed::Pace;
use crate::checkpoint::{self, CheckpointState, Saver, Snapshot};
use crate::config::Config;
use crate::metrics::{Figures, Histogram, Phase, Progress, Recorder, Row, RunFolder};
use crate::{Error, Result};

/// The optimizer's state by name.
type Moments = [(String, Tensor)];

/// Rank 0's record of the run.
pub(super) struct Journal {
    recorder: Recorder,
    progress: Progress,
    saver: Saver,
    config: Config,
    tokenizer: PathBuf,
    /// The update that this start goes on from; checkpoints of it that stand already may stay.
    resumed_at: u64,
    started: Instant,
    /// Seconds of training before this start.
    earlier: f64,
    /// Operations for a token, and operations per second that all ranks can do together.
    flops: (f64, f64),
    /// Rows, samples and distributions that could not be written since the last row that could: a full disk is complained of once
    /// when it begins and once when it ends.
    unwritten: u64,
    /// Why the last checkpoint could not be written.
    lost: Option<Error>,
    /// Whether a checkpoint was saved whose weights no loss has shown to be good yet: older ones then stay.
    unproven: bool,
}

impl Journal {
    /// Opens the record of `run` to go on from `state`.
    pub fn open(
        run: &RunFolder,
        config: &Config,
        tokenizer: &Path,
        state: &CheckpointState,
        total: u64,
        flops: (f64, f64),
    ) -> Result<Journal> {
        checkpoint::clean_leftovers(&run.root)?;
        checkpoint::clean_leftovers(&run.logs)?;
        let superseded = checkpoint::set_aside_later(&run.root, state.global_step)?;
        checkpoint::write_atomically(&run.root.join("config_used.yaml"), config.to_yaml().as_bytes())?;
        let journal = Journal {
            recorder: Recorder::open(run, state.global_step)?,
            progress: Progress::new(state.global_step, total),
            saver: Saver::new(run.root.clone(), config.training.keep_checkpoints),
            config: config.clone(),
            tokenizer: tokenizer.to_path_buf(),
            resumed_at: state.global_step,
            started: Instant::now(),
            earlier: state.wall_time,
            flops,
            unwritten: 0,
            lost: None,
            unproven: false,
        };
        for path in superseded {
            journal.say(&format!("resume: moved a later checkpoint to {}", path.display()));
        }
        Ok(journal)
    }

    /// Says a line.
    pub fn say(&self, text: &str) {
        self.progress.line(text);
    }

    /// Moves the bar.
    pub fn tick(&self, step: u64, update: &Update, lr: f64, tokens_per_s: f64) {
        self.progress.step(step, update.sums.mean_loss(), lr, tokens_per_s);
    }

    /// Says that an update was skipped.
    pub fn skipped(&self, step: u64, update: &Update) {
        if let Some(reason) = update.skipped {
            let norm = update.grad_norm.map(|norm| format!(", gradient norm {norm}")).unwrap_or_default();
            self.say(&format!("step {step} | skipped: {reason} (loss {}{norm})", update.sums.mean_loss()));
        }
    }

    /// Records an update; `skipped` counts those since the start of training.
    pub fn trained(&mut self, place: Place, update: &Update, lr: f64, pace: &Pace, skipped: u64) {
        let (per_token, peak) = self.flops;
        let more = Figures {
            grad_norm: update.grad_norm,
            step_ms: Some(pace.step_ms()),
            mfu: (peak > 0.0).then(|| pace.tokens_per_s() * per_token / peak),
            memory_bytes: crate::memory::resident_bytes(),
            waiting: Some(pace.waiting()),
            skipped: Some(skipped),
            ..Figures::default()
        };
        let row = self.row(Phase::Train, place, &update.sums, lr, pace.tokens_per_s());
        // Not every update counts it.
        let accuracy = row.accuracy.filter(|accuracy| *accuracy > 0.0);
        self.record(&Row { accuracy, more, ..row }, "");
    }

    /// Records a validation.
    pub fn validated(&mut self, place: Place, sums: &Sums, lr: f64, seconds: f64) {
        let more = Figures {
            tokens: Some(sums.tokens as u64),
            bits_per_byte: (sums.bytes > 0.0).then(|| sums.bits_per_byte()),
            ..Figures::default()
        };
        let row = self.row(Phase::Val, place, sums, lr, sums.tokens / seconds);
        self.record(&Row { more, ..row }, &format!(" in {seconds:.1} s"));
    }

    /// Records what the model wrote.
    pub fn sampled(&mut self, global_step: u64, text: &str) {
        let outcome = self.recorder.sample(global_step, text, &self.progress);
        self.complain(outcome);
    }

    /// Records how the weights and their gradients are distributed.
    pub fn histograms(&mut self, global_step: u64, learner: &Learner) {
        let mut outcome = Ok(());
        for (name, parameter) in learner.model.parameters() {
            for (what, tensor) in [("weights", parameter.shallow_clone()), ("gradients", parameter.grad())] {
                if let Some(histogram) = tensor.defined().then(|| Histogram::of(&tensor)).flatten() {
                    outcome = outcome.and(self.recorder.histogram(&format!("{what}/{name}"), global_step, &histogram));
                }
            }
        }
        self.complain(outcome);
    }

    fn row(&self, phase: Phase, place: Place, sums: &Sums, lr: f64, throughput: f64) -> Row {
        Row {
            phase,
            epoch: place.epoch,
            update: place.update,
            global_step: place.global_step,
            lr,
            loss: sums.mean_loss(),
            perplexity: sums.perplexity(),
            accuracy: Some(sums.accuracy()),
            throughput,
            wall_time: self.wall_time(),
            more: Figures::default(),
        }
    }

    fn record(&mut self, row: &Row, detail: &str) {
        let outcome = self.recorder.record(row, detail, &self.progress);
        if outcome.is_ok() {
            self.count_unwritten();
        }
        self.complain(outcome);
    }

    /// A full disk is no reason to lose the run.
    fn complain(&mut self, outcome: Result<()>) {
        let Err(error) = outcome else { return };
        if self.unwritten == 0 {
            self.say(&format!("warning: a row was not recorded: {error}"));
        }
        self.unwritten += 1;
    }

    /// Says how many records are missing; from then on it counts anew.
    fn count_unwritten(&mut self) {
        match std::mem::take(&mut self.unwritten) {
            0 => {}
            count => self.say(&format!(
                "warning: {count} records (rows, samples, distributions) are missing from the run's files: they could not be written"
            )),
        }
    }

    fn wall_time(&self) -> f64 {
        self.earlier + self.started.elapsed().as_secs_f64()
    }

    /// Has the checkpoints `names` of the update that `state` describes written in the background. One that stands
    /// already, from before a resume, stays.
    pub fn save(&mut self, names: &[String], state: &CheckpointState, learner: &Learner, moments: &Moments) {
        let state = CheckpointState {
            wall_time: self.wall_time(),
            scaler: learner.scaler,
            guard: learner.guard.state.clone(),
            ..state.clone()
        };
        let may_stand = state.global_step == self.resumed_at;
        let tokenizer = Some(&*self.tokenizer);
        let snapshot = Snapshot::take(&learner.model.parameters(), moments, state, self.config.clone(), tokenizer);
        names.iter().for_each(|name| self.saver.save(name, &snapshot, may_stand));
        self.unproven = true;
        let failures = self.saver.failures();
        self.warn_of(failures);
    }

    /// The weights that were saved last have given a finite loss: older checkpoints may go.
    pub fn proven(&mut self) {
        if std::mem::take(&mut self.unproven) {
            self.saver.prune();
        }
    }

    /// The older checkpoints are whole: training can go on, but without the last one a run has not succeeded.
    fn warn_of(&mut self, failures: Vec<(String, Error)>) {
        for (name, error) in failures {
            match &*name {
                FINAL => self.lost = Some(error),
                checkpoint::REMOVAL => self.say(&format!("warning: {name} were not removed: {error}")),
                _ => self.say(&format!("warning: {name} was not saved: {error}")),
            }
        }
    }

    /// The newest checkpoint that is whole, once all are written. Where the weights of update `made` are `broken`, what was saved of
    /// them is set aside before.
    pub fn usable(&mut self, root: &Path, broken: bool, made: u64) -> Result<Option<PathBuf>> {
        let failures = self.saver.finish();
        self.warn_of(failures);
        self.count_unwritten();
        if broken {
            for path in checkpoint::set_aside_later(root, made.saturating_sub(1))? {
                self.say(&format!("moved a checkpoint whose loss is not finite to {}", path.display()));
            }
        }
        Ok(checkpoint::find_newest(root)?.newest.map(|(path, _)| path))
    }

    /// Waits for the last checkpoints and takes the bar away.
    ///
    /// # Errors
    /// Where the last of them, `final_model`, could not be written.
    pub fn close(&mut self) -> Result<()> {
        self.proven();
        let failures = self.saver.finish();
        self.warn_of(failures);
        self.count_unwritten();
        self.progress.finish();
        self.lost.take().map_or(Ok(()), Err)
    }
}

/// The name of the last checkpoint.
pub(super) const FINAL: &str = "final_model";

/// The name of the checkpoint with the lowest validation loss.
pub(super) const BEST: &str = "best_model";

/// The place of an update as rows name it; epochs and updates count from 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub epoch: u64,
    pub update: u64,
    pub global_step: u64,
}
