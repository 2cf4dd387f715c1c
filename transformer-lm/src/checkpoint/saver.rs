//! Checkpoints written by a thread of its own while training goes on.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use tch::{Device, Tensor};

use super::{CheckpointState, Contents, prune, save_checkpoint, verify};
use crate::config::Config;
use crate::{Error, Result};

/// A copy of all that goes into a checkpoint, taken between two updates.
#[derive(Debug)]
pub struct Snapshot {
    model: Vec<(String, Tensor)>,
    optimizer: Vec<(String, Tensor)>,
    state: CheckpointState,
    config: Config,
    tokenizer: Option<PathBuf>,
}

impl Snapshot {
    /// Copies the tensors into memory of its own on the CPU.
    pub fn take(
        model: &[(String, Tensor)],
        optimizer: &[(String, Tensor)],
        state: CheckpointState,
        config: Config,
        tokenizer: Option<&Path>,
    ) -> Snapshot {
        let tokenizer = tokenizer.map(Path::to_path_buf);
        Snapshot { model: copies(model), optimizer: copies(optimizer), state, config, tokenizer }
    }

    /// The same tensors once more.
    fn share(&self) -> Snapshot {
        let share =
            |tensors: &[(String, Tensor)]| tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        Snapshot {
            model: share(&self.model),
            optimizer: share(&self.optimizer),
            state: self.state.clone(),
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
        }
    }
}

fn copies(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let copy = |tensor: &Tensor| tensor.detach().to_device(Device::Cpu).contiguous().copy();
    tensors.iter().map(|(name, tensor)| (name.clone(), copy(tensor))).collect()
}

/// What a failure to prune is reported under.
pub(crate) const REMOVAL: &str = "older checkpoints";

/// What the thread is asked for.
enum Job {
    /// To write a checkpoint.
    Write {
        name: String,
        snapshot: Box<Snapshot>,
        /// One of that name and step that is whole may stay.
        may_stand: bool,
    },
    /// To remove the surplus.
    Prune,
}

/// Writes checkpoints in the order they were given, in the background. At most one waits while another is written: then
/// [`Saver::save`] waits too, so that memory is bounded.
#[derive(Debug)]
pub struct Saver {
    /// None once it is finished.
    jobs: Option<SyncSender<Job>>,
    failures: Receiver<(String, Error)>,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// A saver into `folder` that, when asked to prune, leaves the `keep` newest `checkpoint_epoch{E}_step{S}` there; 0 leaves all.
    pub fn new(folder: PathBuf, keep: usize) -> Saver {
        let (jobs, work) = sync_channel::<Job>(1);
        let (failed, failures) = channel();
        let thread = std::thread::spawn(move || {
            for job in work {
                let (name, outcome) = match job {
                    Job::Write { name, snapshot, may_stand } => {
                        let outcome = write(&folder, &name, &snapshot, may_stand);
                        (name, outcome)
                    }
                    Job::Prune => (REMOVAL.to_string(), prune(&folder, keep)),
                };
                if let Err(error) = outcome {
                    let _ = failed.send((name, error)); // nobody listens only where nobody cares any more
                }
            }
        });
        Saver { jobs: Some(jobs), failures, thread: Some(thread) }
    }

    /// Has `snapshot` written under `name`. One that stands there whole at the same step is left alone if it `may_stand`.
    pub fn save(&mut self, name: &str, snapshot: &Snapshot, may_stand: bool) {
        self.send(Job::Write { name: name.to_string(), snapshot: Box::new(snapshot.share()), may_stand });
    }

    /// Has the surplus removed, once what was given before is written.
    pub fn prune(&mut self) {
        self.send(Job::Prune);
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job); // the thread ends before only if it panics, which `finish` finds
        }
    }

    /// The checkpoints that could not be written since the last call, each with the reason.
    pub fn failures(&self) -> Vec<(String, Error)> {
        self.failures.try_iter().collect()
    }

    /// Waits until all is written; what could not be.
    pub fn finish(&mut self) -> Vec<(String, Error)> {
        self.jobs = None;
        let panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
        let reason = || Error::Training("the thread that writes checkpoints has panicked".into());
        self.failures().into_iter().chain(panicked.then(|| ("a checkpoint".to_string(), reason()))).collect()
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.finish();
    }
}

fn write(folder: &Path, name: &str, snapshot: &Snapshot, may_stand: bool) -> Result<()> {
    let step = snapshot.state.global_step;
    if may_stand && verify(&folder.join(name)).is_ok_and(|there| there.global_step == step) {
        return Ok(());
    }
    if let Some((name, _)) = snapshot.model.iter().find(|(_, weight)| !is_finite(weight)) {
        return Err(Error::Training(format!("`{name}` holds weights that are not finite")));
    }
    let contents = Contents {
        model: &snapshot.model,
        optimizer: &snapshot.optimizer,
        state: &snapshot.state,
        config: &snapshot.config,
        tokenizer: snapshot.tokenizer.as_deref(),
    };
    save_checkpoint(folder, name, &contents).map(drop)
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) == 1
}
