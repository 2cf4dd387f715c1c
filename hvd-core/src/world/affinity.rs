//! Binds the engine's thread to a processor.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::config::Config;
use crate::error::{Error, Result};

/// The processor for the engine's thread of a local rank, if the settings name any.
///
/// # Errors
/// [`Error::Config`] if they name none for this rank.
pub(super) fn processor(config: &Config, local_rank: usize) -> Result<Option<usize>> {
    let Config { thread_affinity: processors, .. } = config;
    match processors.get(local_rank) {
        None if !processors.is_empty() => Err(Error::Config(format!(
            "HVD_THREAD_AFFINITY names {} processor(s), and this is local rank {local_rank}; give one for each local rank",
            processors.len()
        ))),
        processor => Ok(processor.copied()),
    }
}

/// Calls `start` while this thread is bound to `processor`: a thread that it starts inherits that.
///
/// # Errors
/// [`Error::Config`] if this process may not use that processor, and what `start` gives.
pub(super) fn inherited<T>(processor: Option<usize>, start: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(processor) = processor else { return start() };
    let before = sched_getaffinity(None).map_err(|error| Error::io("asking for the processors of a thread", error))?;
    if processor >= CpuSet::MAX_CPU || !before.is_set(processor) {
        let text = format!("HVD_THREAD_AFFINITY names processor {processor}, which this process may not use");
        return Err(Error::Config(text));
    }
    let mut alone = CpuSet::new();
    alone.set(processor);
    sched_setaffinity(None, &alone).map_err(|error| Error::io("binding a thread to a processor", error))?;
    let started = start();
    sched_setaffinity(None, &before).map_err(|error| Error::io("freeing a thread from a processor", error))?;
    started
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_inherits_the_processor_and_its_parent_keeps_its_own() {
        let before = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&processor| before.is_set(processor)).unwrap();
        let start = || Ok(std::thread::spawn(|| sched_getaffinity(None).unwrap()).join().unwrap());
        let inside = inherited(Some(first), start).unwrap();
        assert_eq!((inside.count(), inside.is_set(first)), (1, true));
        assert_eq!(sched_getaffinity(None).unwrap(), before);
        assert!(inherited(Some(100_000), || Ok(())).unwrap_err().to_string().contains("100000"));
    }

    #[test]
    fn every_local_rank_needs_a_processor() {
        let config = Config { thread_affinity: vec![3, 1], ..Config::default() };
        assert_eq!(processor(&config, 1).unwrap(), Some(1));
        assert!(processor(&config, 2).unwrap_err().to_string().contains("local rank 2"));
        assert_eq!(processor(&Config::default(), 2).unwrap(), None);
    }
}
