//! Finds good settings by trying them while the program runs.
//!
//! A *sample* is the bytes reduced per second over a few steps of the program. Each candidate is judged by the median of
//! three, as one sample is noisy. The search goes from the settings at the start along one setting at a time, by a factor of
//! four up or down, as long as that is faster by more than the noise (coordinate descent), until no direction is. There are
//! three settings at most, each with one best value that hardly depends on the others: nothing is there for a model (Horovod
//! fits a Gaussian process) to find, and a wrong sample cannot mislead it.
//!
//! Rank 0 measures and decides; the decision travels in a round of negotiation, so that all ranks switch between the same
//! two tensors. With the settings the order of summation may change: the same bits on every run need the tuner off.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::config::{Autotune, Config};
use crate::error::{Error, Result};

/// Samples of one candidate.
const SAMPLES: usize = 3;

/// How much faster a candidate must be: less is noise.
const MARGIN: f64 = 1.02;

/// A candidate's neighbours are so many times larger and smaller.
const FACTOR: u64 = 4;

/// The settings that the tuner changes, all in bytes; see [`Config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // As in `Config`.
pub struct Tuned {
    pub fusion_threshold_bytes: u64,
    pub segment_bytes: u64,
    pub doubling_limit_bytes: u64,
}

impl Tuned {
    /// What the settings say.
    pub fn of(config: &Config) -> Self {
        Tuned {
            fusion_threshold_bytes: config.fusion_threshold_bytes as u64,
            segment_bytes: config.segment_bytes as u64,
            doubling_limit_bytes: config.doubling_limit_bytes as u64,
        }
    }
}

/// One of the settings.
struct Axis {
    /// The variable that, when set, keeps it as it is.
    variable: &'static str,
    /// Whether it means anything where all ranks share memory.
    in_shared_memory: bool,
    of: fn(&mut Tuned) -> &mut u64,
    least: u64,
    most: u64,
}

const AXES: [Axis; 3] = [
    Axis {
        variable: "HVD_FUSION_THRESHOLD",
        in_shared_memory: true,
        of: |tuned| &mut tuned.fusion_threshold_bytes,
        least: 64 << 10,
        most: 1 << 30,
    },
    Axis {
        variable: "HVD_SEGMENT_BYTES",
        in_shared_memory: false,
        of: |tuned| &mut tuned.segment_bytes,
        least: 16 << 10,
        most: 8 << 20,
    },
    Axis {
        variable: "HVD_DOUBLING_LIMIT_BYTES",
        in_shared_memory: false,
        of: |tuned| &mut tuned.doubling_limit_bytes,
        least: 256,
        most: 4 << 20,
    },
];

impl Axis {
    /// The next candidate along this axis; `None` at its end.
    fn neighbour(&self, mut tuned: Tuned, up: bool) -> Option<Tuned> {
        let value = (self.of)(&mut tuned);
        let next = if up { value.saturating_mul(FACTOR) } else { *value / FACTOR };
        let next = next.clamp(self.least, self.most);
        // Clamping must not turn back: a setting may start beyond an end.
        let onward = if up { next > *value } else { next < *value };
        *value = next;
        onward.then_some(tuned)
    }
}

/// The search: knows nothing of time.
struct Search {
    axes: Vec<&'static Axis>,
    best: Tuned,
    best_score: f64,
    tried: HashSet<Tuned>,
    /// Where the next candidate lies from the best one.
    axis: usize,
    up: bool,
    /// Directions in a row that led to nothing better.
    stale: usize,
}

impl Search {
    fn new(start: Tuned, axes: Vec<&'static Axis>) -> Self {
        Search { axes, best: start, best_score: 0.0, tried: [start].into(), axis: 0, up: true, stale: 0 }
    }

    /// What to try after `candidate` was found to be worth `score`; `None` when nothing better is to be found.
    fn next(&mut self, candidate: Tuned, score: f64) -> Option<Tuned> {
        if score > self.best_score * MARGIN {
            (self.best, self.best_score, self.stale) = (candidate, score, 0);
        } else {
            self.turn();
        }
        while self.stale < 2 * self.axes.len() {
            let next = self.axes[self.axis].neighbour(self.best, self.up);
            if let Some(next) = next.filter(|next| self.tried.insert(*next)) {
                return Some(next);
            }
            self.turn();
        }
        None
    }

    fn turn(&mut self) {
        self.stale += 1;
        self.up = !self.up;
        if self.up {
            self.axis = (self.axis + 1) % self.axes.len();
        }
    }
}

/// A sample being taken.
struct Sample {
    since: Instant,
    bytes: u64,
    /// How often each tensor has been reduced.
    seen: HashMap<String, usize>,
}

/// The tuner of rank 0.
pub struct Tuner {
    search: Search,
    /// What is in force.
    candidate: Tuned,
    /// `None` while a change is on its way.
    sample: Option<Sample>,
    scores: Vec<f64>,
    warmup: usize,
    steps_per_sample: usize,
    samples_left: usize,
    taken: usize,
    log: Option<File>,
}

impl Tuner {
    /// A tuner that starts from the settings at hand; `None` where there is nothing to tune: it is off, or all that it could
    /// change was set.
    ///
    /// # Errors
    /// [`Error::Io`] if the log cannot be written.
    pub fn new(config: &Config, shared_memory: bool) -> Result<Option<Self>> {
        let Autotune { enabled, log, warmup_samples, steps_per_sample, max_samples, fixed } = &config.autotune;
        let free = |axis: &&Axis| !fixed.contains(axis.variable) && (axis.in_shared_memory || !shared_memory);
        let axes: Vec<_> = AXES.iter().filter(free).collect();
        if !enabled {
            return Ok(None);
        }
        if axes.is_empty() {
            tracing::warn!(
                "HVD_AUTOTUNE has nothing to find: all settings that matter here are set, so there is no log either"
            );
            return Ok(None);
        }
        let mut tuner = Tuner {
            search: Search::new(Tuned::of(config), axes),
            candidate: Tuned::of(config),
            sample: None,
            scores: Vec::new(),
            warmup: *warmup_samples,
            steps_per_sample: *steps_per_sample,
            samples_left: *max_samples,
            taken: 0,
            log: log.as_ref().map(log_file).transpose()?,
        };
        tuner.write("kind,sample,fusion_threshold_bytes,segment_bytes,doubling_limit_bytes,bytes_per_second");
        tuner.applied(Instant::now());
        Ok(Some(tuner))
    }

    /// The settings that were asked for are in force on all ranks.
    pub fn applied(&mut self, now: Instant) {
        self.sample = Some(Sample { since: now, bytes: 0, seen: HashMap::new() });
    }

    /// A tensor has been reduced. Gives the settings to change to, where it is time for that; with `false` if they are the
    /// last.
    pub fn reduced(&mut self, name: &str, bytes: usize, now: Instant) -> Option<(Tuned, bool)> {
        let sample = self.sample.as_mut()?;
        sample.bytes += bytes as u64;
        let seen = sample.seen.entry(name.into()).or_default();
        *seen += 1;
        if *seen < self.steps_per_sample {
            return None;
        }
        let score = sample.bytes as f64 / now.duration_since(sample.since).as_secs_f64().max(1e-9);
        self.applied(now);
        self.take(score)
    }

    fn take(&mut self, score: f64) -> Option<(Tuned, bool)> {
        if self.warmup > 0 {
            self.warmup -= 1;
            self.record("warmup", self.candidate, score);
            return None;
        }
        self.taken += 1;
        self.samples_left = self.samples_left.saturating_sub(1);
        self.record("sample", self.candidate, score);
        self.scores.push(score);
        if self.scores.len() < SAMPLES && self.samples_left > 0 {
            return None;
        }
        let scores = std::mem::take(&mut self.scores);
        // A candidate that the last sample left without its three is not compared with the others.
        let next = match scores.len() == SAMPLES {
            true => self.search.next(self.candidate, median(scores)),
            false => None,
        };
        let goes_on = next.is_some() && self.samples_left > 0;
        self.candidate = next.filter(|_| goes_on).unwrap_or(self.search.best);
        self.sample = None;
        if !goes_on {
            self.record("best", self.search.best, self.search.best_score);
            tracing::info!(settings = ?self.search.best, "the tuner has ended");
        }
        Some((self.candidate, goes_on))
    }

    fn record(&mut self, kind: &str, tuned: Tuned, score: f64) {
        let Tuned { fusion_threshold_bytes, segment_bytes, doubling_limit_bytes } = tuned;
        let sample = self.taken;
        self.write(&format!(
            "{kind},{sample},{fusion_threshold_bytes},{segment_bytes},{doubling_limit_bytes},{score:.0}"
        ));
    }

    /// A line of the log. A log that cannot be written ends; the tuner goes on.
    fn write(&mut self, line: &str) {
        if let Some(error) = self.log.as_mut().and_then(|log| writeln!(log, "{line}").err()) {
            tracing::warn!("the tuner's log ends here, as it cannot be written: {error}");
            self.log = None;
        }
    }
}

fn log_file(path: &PathBuf) -> Result<File> {
    File::create(path)
        .map_err(|error| Error::io(format!("writing the tuner's log {} (HVD_AUTOTUNE_LOG)", path.display()), error))
}

fn median(mut scores: Vec<f64>) -> f64 {
    scores.sort_by(f64::total_cmp);
    scores[scores.len() / 2]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const START: Tuned =
        Tuned { fusion_threshold_bytes: 128 << 20, segment_bytes: 512 << 10, doubling_limit_bytes: 16 << 10 };

    /// How fast a made-up machine is that likes one value of each setting best.
    fn speed(tuned: Tuned, likes: [u64; 3]) -> f64 {
        let Tuned { fusion_threshold_bytes, segment_bytes, doubling_limit_bytes } = tuned;
        let values = [fusion_threshold_bytes, segment_bytes, doubling_limit_bytes];
        let off = values.iter().zip(likes).map(|(&value, like)| (value as f64 / like as f64).log2().abs());
        1e9 / (1.0 + off.sum::<f64>() / 10.0)
    }

    fn search(likes: [u64; 3], axes: Vec<&'static Axis>) -> (Tuned, usize) {
        let mut search = Search::new(START, axes);
        let mut candidate = START;
        for tries in 1.. {
            match search.next(candidate, speed(candidate, likes)) {
                Some(next) => candidate = next,
                None => return (search.best, tries),
            }
        }
        unreachable!()
    }

    #[test]
    fn the_search_finds_what_the_machine_likes() {
        for likes in [[128 << 20, 512 << 10, 16 << 10], [2 << 20, 128 << 10, 1 << 20], [1 << 30, 8 << 20, 256]] {
            let (best, tries) = search(likes, AXES.iter().collect());
            assert_eq!(speed(best, likes), 1e9, "{best:?} after {tries}");
            assert!(tries <= 30, "{tries}");
        }
    }

    #[test]
    fn what_was_set_stays_fixed() {
        let (best, _) = search([2 << 20, 128 << 10, 1 << 20], vec![&AXES[1]]);
        assert_eq!(best, Tuned { segment_bytes: 128 << 10, ..START });
    }

    #[test]
    fn no_setting_passes_its_ends() {
        let tiny = Tuned { doubling_limit_bytes: 0, ..START };
        assert_eq!(AXES[2].neighbour(tiny, false), None);
        assert_eq!(AXES[2].neighbour(tiny, true), Some(Tuned { doubling_limit_bytes: 256, ..START }));
        let huge = Tuned { fusion_threshold_bytes: u64::MAX, ..START };
        assert_eq!(AXES[0].neighbour(huge, true), None);
        assert_eq!(AXES[0].neighbour(huge, false), Some(Tuned { fusion_threshold_bytes: 1 << 30, ..START }));
    }

    /// Runs the tuner against a machine whose time is made up, with a slow sample now and then.
    fn tune(config: &Config, likes: [u64; 3]) -> Tuned {
        let Ok(Some(mut tuner)) = Tuner::new(config, false) else { panic!("no tuner") };
        let (mut now, mut candidate, mut step) = (Instant::now(), Tuned::of(config), 0u64);
        loop {
            step += 1;
            let slow = if step % 70 == 0 { 5.0 } else { 1.0 };
            now += Duration::from_secs_f64(slow * 1e9 / speed(candidate, likes));
            match tuner.reduced("tensor", 1 << 30, now) {
                Some((last, false)) => return last,
                Some((next, true)) => {
                    candidate = next;
                    tuner.applied(now);
                }
                None => {}
            }
        }
    }

    #[test]
    fn the_tuner_is_not_misled_by_a_slow_sample_and_logs_what_it_tried() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.autotune.enabled = true;
        config.autotune.log = Some(folder.path().join("log.csv"));
        let likes = [8 << 20, 256 << 10, 1 << 20];
        let best = tune(&config, likes);
        assert_eq!(speed(best, likes), 1e9, "{best:?}");
        let log = std::fs::read_to_string(folder.path().join("log.csv")).unwrap();
        let kinds: Vec<_> = log.lines().map(|line| line.split(',').next().unwrap()).collect();
        assert_eq!(kinds[..5], ["kind", "warmup", "warmup", "warmup", "sample"]);
        assert_eq!(kinds.iter().filter(|kind| **kind == "best").count(), 1);
        assert!(log.lines().last().unwrap().starts_with("best,"), "{log}");
        assert!(log.contains(",8388608,262144,1048576,"), "{log}");
    }

    #[test]
    fn the_tuner_ends_after_the_samples_it_may_take() {
        let mut config = Config::default();
        config.autotune.enabled = true;
        config.autotune.max_samples = 4;
        assert_eq!(tune(&config, [1 << 20, 1 << 20, 1 << 20]), Tuned::of(&config));
    }

    #[test]
    fn there_is_no_tuner_where_there_is_nothing_to_tune() {
        let mut config = Config::default();
        assert!(Tuner::new(&config, false).unwrap().is_none());
        config.autotune.enabled = true;
        assert!(Tuner::new(&config, true).unwrap().is_some());
        config.autotune.fixed.insert("HVD_FUSION_THRESHOLD");
        assert!(Tuner::new(&config, false).unwrap().is_some());
        assert!(Tuner::new(&config, true).unwrap().is_none());
    }
}
