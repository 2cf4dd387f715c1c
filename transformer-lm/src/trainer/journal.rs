//! What rank 0 keeps of a run: rows, lines and checkpoints.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::Tensor;

use super::learner::{Learner, Sums, Update};
use crate::Result;
use crate::checkpoint::{self, CheckpointState, Contents};
use crate::config::Config;
use crate::metrics::{Phase, Progress, Recorder, Row, RunFolder};

/// The optimizer's state by name.
type Moments = [(String, Tensor)];

/// Rank 0's record of the run.
pub(super) struct Journal {
    run: RunFolder,
    recorder: Recorder,
    progress: Progress,
    config: Config,
    tokenizer: PathBuf,
    total: u64,
    /// The update that this start goes on from; checkpoints of later ones are written anew.
    resumed_at: u64,
    started: Instant,
    /// Seconds of training before this start.
    earlier: f64,
}

impl Journal {
    /// Opens the record of `run` to go on from `state`.
    pub fn open(
        run: RunFolder,
        config: &Config,
        tokenizer: &Path,
        state: &CheckpointState,
        total: u64,
    ) -> Result<Journal> {
        checkpoint::clean_leftovers(&run.root)?;
        checkpoint::clean_leftovers(&run.logs)?;
        checkpoint::write_atomically(&run.root.join("config_used.yaml"), config.to_yaml().as_bytes())?;
        Ok(Journal {
            recorder: Recorder::open(&run, state.global_step)?,
            progress: Progress::new(state.global_step, total),
            run,
            config: config.clone(),
            tokenizer: tokenizer.to_path_buf(),
            total,
            resumed_at: state.global_step,
            started: Instant::now(),
            earlier: state.wall_time,
        })
    }

    /// Says a line.
    pub fn say(&self, text: &str) {
        self.progress.line(text);
    }

    /// Moves the bar.
    pub fn tick(&self, step: u64, update: &Update, lr: f64, tokens_per_s: f64) {
        self.progress.step(step, update.sums.mean_loss(), lr, tokens_per_s);
    }

    /// Records an update.
    pub fn trained(&mut self, place: Place, update: &Update, lr: f64, tokens_per_s: f64) -> Result<()> {
        let norm = update.grad_norm.map(|norm| format!(" | gradient norm {norm:.3}")).unwrap_or_default();
        let detail = if update.skipped { format!("{norm} | skipped: overflow in fp16") } else { norm };
        let row = self.row(Phase::Train, place, &update.sums, lr, tokens_per_s);
        self.recorder.record(&row, &detail, &self.progress)
    }

    /// Records a validation.
    pub fn validated(&mut self, place: Place, sums: &Sums, lr: f64, seconds: f64) -> Result<()> {
        let row = self.row(Phase::Val, place, sums, lr, sums.tokens / seconds);
        let detail = format!(" | {} tokens in {seconds:.1} s", sums.tokens);
        self.recorder.record(&row, &detail, &self.progress)
    }

    fn row(&self, phase: Phase, place: Place, sums: &Sums, lr: f64, throughput: f64) -> Row {
        Row {
            phase,
            epoch: place.epoch,
            update: place.update,
            global_step: place.global_step,
            lr,
            loss: sums.mean_loss(),
            // Not every update counts it.
            accuracy: (sums.correct > 0.0 || phase == Phase::Val).then(|| sums.accuracy()),
            throughput,
            wall_time: self.wall_time(),
        }
    }

    fn wall_time(&self) -> f64 {
        self.earlier + self.started.elapsed().as_secs_f64()
    }

    /// Writes the checkpoints that are due after the update that `state` describes. One that stands already, from
    /// before a resume, stays.
    pub fn save_due(&self, state: &CheckpointState, learner: &Learner, moments: &Moments) -> Result<()> {
        let every = self.config.training.save_interval;
        let at_edge = state.step == 0;
        let epoch = if at_edge { state.epoch } else { state.epoch + 1 };
        if every > 0 && state.global_step.is_multiple_of(every) {
            self.save_or_warn(&format!("checkpoint_epoch{epoch}_step{}", state.global_step), state, learner, moments);
            checkpoint::prune(&self.run.root, self.config.training.keep_checkpoints)?;
        }
        if at_edge {
            self.save_or_warn(&format!("checkpoint_epoch{epoch}"), state, learner, moments);
        }
        if state.global_step >= self.total {
            self.save("final_model", state, learner, moments)?;
        }
        Ok(())
    }

    /// Writes `best_model`.
    pub fn save_best(&self, state: &CheckpointState, learner: &Learner, moments: &Moments) {
        self.save_or_warn("best_model", state, learner, moments);
    }

    /// A full disk is no reason to lose the run: the older checkpoints are whole.
    fn save_or_warn(&self, name: &str, state: &CheckpointState, learner: &Learner, moments: &Moments) {
        if let Err(error) = self.save(name, state, learner, moments) {
            self.say(&format!("warning: {name} was not saved: {error}"));
        }
    }

    fn save(&self, name: &str, state: &CheckpointState, learner: &Learner, moments: &Moments) -> Result<()> {
        let path = self.run.root.join(name);
        let resumed = state.global_step == self.resumed_at;
        if resumed && checkpoint::verify(&path).is_ok_and(|there| there.global_step == state.global_step) {
            return Ok(());
        }
        let state = CheckpointState { wall_time: self.wall_time(), scaler: learner.scaler, ..state.clone() };
        let contents = Contents {
            model: &learner.model.parameters(),
            optimizer: moments,
            state: &state,
            config: &self.config,
            tokenizer: Some(&self.tokenizer),
        };
        checkpoint::save_checkpoint(&self.run.root, name, &contents).map(drop)
    }

    /// Takes the bar away.
    pub fn close(&self) {
        self.progress.finish();
    }
}

/// The place of an update as rows name it; epochs and updates count from 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub epoch: u64,
    pub update: u64,
    pub global_step: u64,
}
