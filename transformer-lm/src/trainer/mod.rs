//! The training loop, from the first step to the last checkpoint.

mod benchmark;
mod evaluation;
mod forecast;
mod guard;
mod journal;
mod learner;
mod plan;
mod profile;
mod resume;
mod schedule;
mod setup;
mod speed;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use tch::Device;

use crate::checkpoint::{self, CheckpointState, FORMAT_VERSION, GuardState};
use crate::config::{Config, TrainingSection};
use crate::data::{
    BatchStream, LoaderConfig, PreparedData, TOKENIZER_FILE, Tokenizer, TrainLoader, load_preprocessed_data, loaders_of,
};
use crate::generate::{TextParams, generate_text};
use crate::metrics::{self, RunFolder, RunLock, RunMetadata};
use crate::model::ModelConfig;
use crate::{Error, Result};

use journal::{BEST, FINAL, Journal, Place};
use speed::Pace;

pub use benchmark::{Benchmark, Measured, Preset};
pub use evaluation::{Evaluator, Precision, Sums};
pub use forecast::{Forecast, forecast};
pub use guard::{Guard, Skip};
pub use learner::{Learner, Update};
pub use plan::{BatchPlan, most_at_once, total_steps};
pub use resume::Resume;
pub use schedule::Schedule;
pub use setup::{Setup, device_of, launched_rank, setup_horovod};
pub use speed::{flops_per_token, measure_peak_flops};

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The run's folder; rank 0 only.
    pub run: Option<PathBuf>,
    /// Updates since the start of training.
    pub global_step: u64,
    /// Loss of the last update, in nats per token.
    pub loss: Option<f64>,
    /// Lowest loss over the held-out part, in nats per token.
    pub best_val_loss: Option<f64>,
}

/// Trains as `config` says, on as many ranks as the launcher started; every rank calls it.
///
/// A world that the caller has initialised stays; otherwise it is shut down at the end.
/// The run is recorded in a new folder `<timestamp>_<run_name>`, or in that of the checkpoint it goes on from.
///
/// # Errors
/// Everything that can be wrong with configuration, data, checkpoints and peers. The other ranks are told the cause.
pub fn run_distributed_training(config: &Config, resume: Option<&Resume>, run_name: &str) -> Result<Summary> {
    let own_world = !hvd_torch::is_initialised();
    let setup = setup_horovod(false)?;
    // It costs memory, which is scarcer than time where ranks outnumber the cores.
    if !setup.crowded {
        crate::memory::keep_freed_memory();
    }
    let outcome = Run::start(config, resume, run_name, &setup).and_then(Run::train);
    match &outcome {
        Ok(_) if own_world => hvd_torch::shutdown().map_err(hvd_torch::Error::from)?,
        Ok(_) => {}
        Err(error) if error.is_lost_peer() => {} // whoever failed first has told everyone
        Err(error) => setup.world.abort(&error.to_string()),
    }
    outcome
}

/// A run between two updates.
struct Run<'a> {
    setup: &'a Setup,
    /// With the vocabulary's size filled in.
    config: Config,
    train: TrainLoader,
    /// Batches from the present position on.
    batches: BatchStream,
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    learner: Learner,
    schedule: Schedule,
    /// Updates in all.
    total: u64,
    state: CheckpointState,
    /// Rank 0's.
    journal: Option<Journal>,
    run: Option<PathBuf>,
    /// Of the updates since the last row.
    pace: Pace,
    /// Whether the last figure was a finite validation loss or that of an update that was made: other weights are not saved.
    usable: bool,
    /// Whether a checkpoint was due while they were not: the next weights that are usable are saved.
    overdue: bool,
    /// The last update that was made, not skipped.
    made: u64,
    /// Rank 0's; the last field, as it goes after the journal has ended.
    lock: Option<RunLock>,
}

impl<'a> Run<'a> {
    /// Opens the data, makes the model, and takes up the checkpoint, if any.
    fn start(config: &Config, resume: Option<&Resume>, run_name: &str, setup: &'a Setup) -> Result<Run<'a>> {
        let data = load_preprocessed_data(&config.data.data_dir)?;
        let config = config.resolved(data.vocab_size)?;
        let shape = config.model_config(data.vocab_size);
        let device = device_of(config.training.device, setup)?;
        let plan = BatchPlan::new(&config.training, setup.world_size, most_at_once(device, &shape))?;
        let (train, val) = loaders_of(&data, &loader_config(&config, &plan, setup, device))?;
        let total = total_steps(&config.training, train.steps_per_epoch());
        let learner = Learner::new(&config, &shape, &plan, &setup.world, device)?;
        let evaluator = Evaluator::new(val, &data.tokenizer, learner.precision);
        let mut run = Run {
            batches: train.stream(0, 0, 0),
            tokenizer: data.tokenizer.clone(),
            schedule: Schedule::new(&config.training, setup.world_size, total),
            state: fresh_state(&config, &plan, &train, setup),
            setup,
            train,
            evaluator,
            learner,
            total,
            journal: None,
            run: None,
            pace: Pace::default(),
            usable: true,
            overdue: false,
            made: 0,
            lock: None,
            config,
        };
        run.take_up(resume, run_name, &shape, device)?;
        run.made = run.state.global_step;
        let CheckpointState { epoch, step, .. } = run.state;
        run.batches = match run.config.training.overfit_one_batch {
            true => run.train.repeated(),
            false => run.train.stream(epoch, step, run.config.data.num_workers),
        };
        run.introduce(&data, &shape, &plan, device);
        Ok(run)
    }

    /// Rank 0 finds the folder and loads the checkpoint; the others take its state.
    fn take_up(&mut self, resume: Option<&Resume>, run_name: &str, shape: &ModelConfig, device: Device) -> Result<()> {
        self.agree()?;
        if let Some(path) = &self.config.training.profile {
            profile::start(path, &self.setup.world)?;
        }
        let here = self.describe_device(device);
        let mut moments = Vec::new();
        let devices = self.setup.world.allgather_object("run.devices", &here).map_err(hvd_torch::Error::from)?;
        if self.setup.rank == 0 {
            let start = resume::find(&self.config.paths, resume, run_name)?;
            if start.checkpoint.is_none() {
                self.learner.init_from(self.config.training.init_from.as_deref())?;
            }
            if let Some(path) = &start.checkpoint {
                let saved = checkpoint::read_state(path)?;
                resume::check(path, &saved, &self.state)?;
                let loaded = checkpoint::read_checkpoint(path, &self.learner.model)?;
                if loaded.state.global_step > 0 {
                    let refuse = |error: Error| Error::checkpoint(path, format!("optimizer.safetensors: {error}"));
                    self.learner.check_moments(&loaded.moments).map_err(refuse)?;
                }
                crate::model::copy_weights(&self.learner.model, loaded.weights, path)?;
                moments = loaded.moments;
                let world_size = self.setup.world_size;
                self.state = CheckpointState { world_size, files: BTreeMap::new(), ..loaded.state };
            }
            // Only now, so that a run that cannot start leaves no folder.
            let (run, lock) = match start.run {
                Some((run, lock)) => (run.with_folders()?, lock),
                None => {
                    let run = RunFolder::create(&self.config.paths, run_name)?;
                    let lock = RunLock::take(&run.root)?;
                    (run, lock)
                }
            };
            self.lock = Some(lock);
            self.run = Some(run.root.clone());
            let peak = devices.iter().map(|device| device.peak_flops).sum();
            RunMetadata::collect(devices, start.checkpoint.as_deref()).append(&run.root)?;
            let tokenizer = self.config.data.data_dir.join(TOKENIZER_FILE);
            let flops = (flops_per_token(shape), peak);
            let journal = Journal::open(&run, &self.config, &tokenizer, &self.state, self.total, flops)?;
            start.notes.iter().for_each(|note| journal.say(note));
            self.journal = Some(journal);
        }
        let state = (self.setup.rank == 0).then(|| self.state.clone());
        self.state = self.setup.world.broadcast_object("run.state", state, 0).map_err(hvd_torch::Error::from)?;
        self.learner.scaler = self.state.scaler.or(self.learner.scaler);
        self.learner.guard.state = self.state.guard.clone();
        self.learner.broadcast()?;
        match self.state.global_step {
            0 => Ok(()),
            _ => self.learner.load_moments(&moments),
        }
    }

    /// This rank's place and speed.
    fn describe_device(&self, device: Device) -> metrics::Device {
        let kind = self.learner.precision.of_products();
        let peak = self.config.training.peak_tflops.map(|tflops| 1e12 * tflops);
        metrics::Device {
            host: metrics::host(),
            device: device_name(device),
            threads: self.setup.threads,
            peak_flops: peak.unwrap_or_else(|| measure_peak_flops(device, kind)),
        }
    }

    /// Refuses ranks that would train differently, or wait for each other at different places: where each host has files
    /// of its own, they may differ.
    fn agree(&self) -> Result<()> {
        let Config { model, training, distributed, seed, .. } = &self.config;
        let training = TrainingSection { device: TrainingSection::default().device, ..training.clone() };
        let settings = format!("{model:?} {training:?} {distributed:?} {seed:?}");
        let data = (self.train.steps_per_epoch(), self.evaluator.total_predictions());
        let all =
            self.setup.world.allgather_object("run.settings", &(settings, data)).map_err(hvd_torch::Error::from)?;
        let differs = |what: &str, rank: usize| {
            Error::Config(format!("rank {rank} has another {what} than rank 0\nhint: give all hosts the same files"))
        };
        for (rank, (settings, data)) in all.iter().enumerate() {
            if *settings != all[0].0 {
                return Err(differs("configuration", rank));
            }
            if *data != all[0].1 {
                return Err(differs("amount of data", rank));
            }
        }
        Ok(())
    }

    fn train(mut self) -> Result<Summary> {
        if self.state.global_step > 0 {
            self.save(self.due_checkpoints())?; // what a kill prevented right after the checkpoint that we go on from
        }
        while self.state.global_step < self.total && !self.has_converged() {
            self.update()?;
            let best = self.is_due(self.config.training.eval_interval) && self.validate()?;
            let best = best.then(|| BEST.to_string());
            self.save(best.into_iter().chain(self.due_checkpoints()).collect())?;
        }
        self.finish()
    }

    /// One update, and its row where one is due.
    fn update(&mut self) -> Result<()> {
        let (done, lr) = (self.state.global_step, self.schedule.at(self.state.global_step));
        let place = Place { epoch: self.state.epoch + 1, update: self.state.step + 1, global_step: done + 1 };
        let logs = done == 0 || (done + 1).is_multiple_of(self.config.training.log_interval) || done + 1 == self.total;
        let started = Instant::now();
        let batches = self.batches.next().unwrap_or_else(|| Ok(Vec::new()))?;
        profile::mark(&self.setup.world, profile::DATA, started);
        let update = match self.learner.update(&batches, lr, done, logs) {
            Err(Error::Training(reason)) if self.learner.guard.gives_up() => {
                let broken = !self.evaluator.evaluate(&self.learner.model, &self.setup.world)?.mean_loss().is_finite();
                return Err(self.give_up(reason, broken)?);
            }
            update => update?,
        };
        profile::mark(&self.setup.world, profile::UPDATE, started);
        self.pace.add(update.sums.tokens, started.elapsed().as_secs_f64(), update.waited);
        self.advance(update.sums.mean_loss());
        self.usable = update.skipped.is_none() && self.state.loss.is_some();
        if update.skipped.is_none() {
            self.made = self.state.global_step;
        }
        let every = self.config.training.histogram_interval;
        if let Some(journal) = &mut self.journal {
            if self.usable {
                journal.proven(); // this loss was that of the weights that were saved last
            }
            journal.tick(done + 1, &update, lr, self.pace.tokens_per_s());
            journal.skipped(done + 1, &update);
            if logs {
                journal.trained(place, &update, lr, &self.pace, self.learner.guard.state.skipped);
            }
            if every > 0 && (done + 1).is_multiple_of(every) {
                journal.histograms(done + 1, &self.learner);
            }
        }
        if logs {
            self.pace = Pace::default();
        }
        Ok(())
    }

    /// Moves the position past an update.
    fn advance(&mut self, loss: f64) {
        let state = &mut self.state;
        let loss = loss.is_finite().then_some(loss);
        (state.global_step, state.step, state.loss) = (state.global_step + 1, state.step + 1, loss);
        if state.step == self.train.steps_per_epoch() {
            (state.epoch, state.step) = (state.epoch + 1, 0);
        }
    }

    /// Every `interval` updates (0: never), at the end of an epoch and at the end of training.
    fn is_due(&self, interval: u64) -> bool {
        let step = self.state.global_step;
        step == self.total || self.state.step == 0 || (interval > 0 && step.is_multiple_of(interval))
    }

    /// Whether the loss over the held-out part has not fallen for as long as the configuration's patience. Of one batch learnt by
    /// heart it says nothing.
    fn has_converged(&self) -> bool {
        let training = &self.config.training;
        let patience = training.early_stopping_patience.filter(|_| !training.overfit_one_batch);
        patience.is_some_and(|patience| self.state.validations_since_best >= patience)
    }

    /// The loss over the whole held-out part; each rank takes a share. Whether it is the lowest so far.
    fn validate(&mut self) -> Result<bool> {
        let started = Instant::now();
        let sums = self.evaluator.evaluate(&self.learner.model, &self.setup.world)?;
        profile::mark(&self.setup.world, profile::VALIDATION, started);
        self.usable = sums.mean_loss().is_finite();
        let best = self.usable && self.state.best_val_loss.is_none_or(|best| sums.mean_loss() < best);
        if best {
            self.state.best_val_loss = Some(sums.mean_loss());
        }
        self.state.validations_since_best = if best { 0 } else { self.state.validations_since_best + 1 };
        let place = self.last_place();
        let lr = self.schedule.at(self.state.global_step - 1);
        if let Some(journal) = &mut self.journal {
            journal.validated(place, &sums, lr, started.elapsed().as_secs_f64());
        }
        self.sample();
        Ok(best)
    }

    /// The update that was made last, as rows name it.
    fn last_place(&self) -> Place {
        let CheckpointState { epoch, step, global_step, .. } = self.state;
        match step {
            0 => Place { epoch, update: self.train.steps_per_epoch(), global_step },
            _ => Place { epoch: epoch + 1, update: step, global_step },
        }
    }

    /// Rank 0 lets the model speak. Its draws are its own, so training goes on as if it had not.
    fn sample(&mut self) {
        let (training, generation) = (&self.config.training, &self.config.generation);
        let Some(journal) = self.journal.as_mut().filter(|_| training.sample_tokens > 0) else { return };
        let params = TextParams::of(generation, training.sample_tokens, self.config.seed.0);
        match generate_text(&self.learner.model, &self.tokenizer, &training.sample_prompt, &params, 1) {
            Ok(texts) => texts.iter().for_each(|text| journal.sampled(self.state.global_step, text)),
            Err(error) => journal.say(&format!("warning: no sample: {error}")),
        }
    }

    /// The names of the checkpoints that are due after the last update, apart from the best.
    fn due_checkpoints(&self) -> Vec<String> {
        let CheckpointState { epoch, step, global_step, .. } = self.state;
        let at_edge = step == 0;
        let epoch = if at_edge { epoch } else { epoch + 1 };
        let every = self.config.training.save_interval;
        let names = [
            (self.overdue || every > 0 && global_step.is_multiple_of(every))
                .then(|| format!("checkpoint_epoch{epoch}_step{global_step}")),
            at_edge.then(|| format!("checkpoint_epoch{epoch}")),
            (global_step >= self.total || self.has_converged()).then(|| FINAL.to_string()),
        ];
        names.into_iter().flatten().collect()
    }

    /// Has these checkpoints written, if the weights are usable. All ranks call it: the optimizer's state may lie on all of them.
    fn save(&mut self, names: Vec<String>) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let was_overdue = std::mem::replace(&mut self.overdue, !self.usable);
        if self.overdue {
            if let Some(journal) = self.journal.as_ref().filter(|_| !was_overdue) {
                journal.say(
                    "warning: no checkpoint is saved until there is a finite loss and an update that is not skipped",
                );
            }
            return Ok(());
        }
        let started = Instant::now();
        let moments = self.learner.moments()?;
        if let Some(journal) = &mut self.journal {
            journal.save(&names, &self.state, &self.learner, &moments);
        }
        profile::mark(&self.setup.world, profile::CHECKPOINT, started);
        Ok(())
    }

    /// Why training ends without a result: `reason`, and what to go on from, which weights that are `broken` are not. All ranks call
    /// it and have the same answer.
    fn give_up(&mut self, reason: String, broken: bool) -> Result<Error> {
        let advice = match (&mut self.journal, &self.run) {
            (Some(journal), Some(run)) => Some(match journal.usable(run, broken, self.made)? {
                Some(path) => format!(", then go on with --resume {}", path.display()),
                None => ", then start again: there is no checkpoint that is usable".to_string(),
            }),
            _ => None,
        };
        let advice = self.setup.world.broadcast_object("run.advice", advice, 0).map_err(hvd_torch::Error::from)?;
        Ok(Error::Training(format!("{reason}{advice}")))
    }

    fn finish(mut self) -> Result<Summary> {
        if self.config.training.profile.is_some() {
            self.setup.world.stop_timeline();
        }
        if !self.usable {
            let step = self.state.global_step;
            let reason = format!(
                "the validation loss after the last update, {step}, is not finite: final_model was not saved\n\
                 hint: lower training.learning_rate or raise training.warmup_steps"
            );
            return Err(self.give_up(reason, true)?);
        }
        let stopped_early = self.has_converged() && self.state.global_step < self.total;
        let CheckpointState { global_step, loss, best_val_loss, .. } = self.state;
        if let Some(journal) = &mut self.journal {
            journal.close()?;
            let best = best_val_loss
                .map(|loss| format!("; best validation loss {loss:.4} nats per token"))
                .unwrap_or_default();
            let early = if stopped_early { " (stopped early: the validation loss no longer falls)" } else { "" };
            let folder = self.run.as_ref().map(|run| run.display().to_string()).unwrap_or_default();
            journal.say(&format!("done: {global_step} updates{early}{best}\nrun folder: {folder}"));
        }
        Ok(Summary { run: self.run, global_step, loss, best_val_loss })
    }

    /// Tells a person what is about to happen.
    fn introduce(&self, data: &PreparedData, shape: &ModelConfig, plan: &BatchPlan, device: Device) {
        let Some(journal) = &self.journal else { return };
        let (ranks, threads) = (self.setup.world_size, self.setup.threads);
        let per_epoch = self.train.steps_per_epoch();
        for line in [
            format!(
                "model: {} parameters ({} layers of width {}, {} heads, context {}), vocabulary {} ({})",
                metrics::thousands(shape.parameter_count() as f64),
                shape.n_layers,
                shape.d_model,
                shape.n_heads,
                shape.max_seq_len,
                shape.vocab_size,
                data.tokenizer.name()
            ),
            format!(
                "ranks: {ranks} ({}), threads per rank: {threads}, device: {}, precision: {:?}, products in {:?}",
                self.setup.world.backend(),
                device_name(device),
                self.config.training.amp_dtype,
                self.learner.precision.of_products()
            ),
            format!(
                "batch: {} per update = {} x {} x {}",
                metrics::count(plan.global, "sequence"),
                metrics::count(ranks, "rank"),
                metrics::count(plan.accumulation, "micro-batch"),
                metrics::count(plan.micro, "sequence")
            ),
            format!(
                "steps: {} of {} updates done; {per_epoch} updates are an epoch; held out: {} tokens",
                self.state.global_step,
                self.total,
                metrics::thousands(self.evaluator.total_predictions() as f64)
            ),
        ] {
            journal.say(&line);
        }
        if let Some(run) = &self.run {
            journal.say(&format!("run folder: {}", run.display()));
        }
        for warning in self.config.warnings() {
            journal.say(&format!("warning: {warning}"));
        }
    }
}

fn loader_config(config: &Config, plan: &BatchPlan, setup: &Setup, device: Device) -> LoaderConfig {
    LoaderConfig {
        data_dir: config.data.data_dir.clone(),
        seq_len: config.model.max_seq_len,
        global_batch: plan.global,
        micro_batch: plan.micro,
        rank: setup.rank,
        size: setup.world_size,
        seed: config.seed.0,
        device,
    }
}

fn fresh_state(config: &Config, plan: &BatchPlan, train: &TrainLoader, setup: &Setup) -> CheckpointState {
    CheckpointState {
        format_version: FORMAT_VERSION,
        epoch: 0,
        step: 0,
        global_step: 0,
        loss: None,
        best_val_loss: None,
        seed: config.seed.0,
        global_batch_size: plan.global,
        batches_per_epoch: train.steps_per_epoch(),
        world_size: setup.world_size,
        wall_time: 0.0,
        scaler: None,
        guard: GuardState::default(),
        validations_since_best: 0,
        files: BTreeMap::new(),
    }
}

fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}
