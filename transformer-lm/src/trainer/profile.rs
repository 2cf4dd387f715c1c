//! What an update's time goes to, as slices in the runtime's timeline: a file that Perfetto (ui.perfetto.dev) opens.
//!
//! Each rank has a row with its updates, and in each update the reading of data, forward and backward of each micro-batch, the
//! wait for the other ranks and for gradients under way, and the optimizer (clipping included). Below are the rows of the
//! gradients' buckets, as [`hvd_core::World::start_timeline`] shows them, so that one sees what overlaps. On CUDA the slices
//! are the time that the processor took to ask for the work.

use std::path::Path;
use std::time::Instant;

use hvd_torch::World;

use crate::{Error, Result};

/// The row of the trainer in the timeline.
const ROW: &str = "training";

/// An update with all that belongs to it.
pub(super) const UPDATE: &str = "update";
/// Taking the batches of an update from the loader.
pub(super) const DATA: &str = "data";
/// Forward pass of a micro-batch.
pub(super) const FORWARD: &str = "forward";
/// Backward pass of a micro-batch.
pub(super) const BACKWARD: &str = "backward";
/// Waiting for the other ranks' figures and for gradients that are not reduced yet.
pub(super) const WAIT: &str = "wait for communication";
/// Clipping and updating.
pub(super) const OPTIMIZER: &str = "optimizer";
/// Measuring the held-out part.
pub(super) const VALIDATION: &str = "validation";
/// Copying what goes into a checkpoint; it is written in the background.
pub(super) const CHECKPOINT: &str = "checkpoint";

/// Starts the profile of all ranks in the file `path`, which is made anew. All ranks must call it.
///
/// # Errors
/// [`Error::Config`] where a timeline is being written already; [`Error::Hvd`] where the file cannot be written.
pub(super) fn start(path: &Path, world: &World) -> Result<()> {
    if world.has_timeline() {
        return Err(Error::Config(
            "--profile and HVD_TIMELINE both write a timeline\n\
             hint: leave HVD_TIMELINE out; the profile shows all that it would"
                .into(),
        ));
    }
    Ok(world.start_timeline_anew(path, false).map_err(hvd_torch::Error::from)?)
}

/// Shows `name` from `started` until now, if a profile is being written.
pub(super) fn mark(world: &World, name: &'static str, started: Instant) {
    world.mark_timeline(ROW, name, started);
}
