//! Batches for training and validation, dealt to ranks.

use std::ops::Range;
use std::path::PathBuf;

use hvd_torch::DistributedSampler;
use tch::{Device, Tensor};

use super::ordered::Ordered;
use super::{PreparedData, TokenDataset, load_preprocessed_data};
use crate::{Error, Result};

/// How the data is dealt.
#[derive(Clone, Debug)]
pub struct LoaderConfig {
    /// The folder that `lm prepare` made.
    pub data_dir: PathBuf,
    /// Predictions in a block: the model's `max_seq_len`.
    pub seq_len: usize,
    /// Sequences of one optimizer step over all ranks; a multiple of `size · micro_batch`.
    pub global_batch: usize,
    /// Sequences that a rank runs at once.
    pub micro_batch: usize,
    /// This process.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Decides the order of the blocks.
    pub seed: u64,
    /// Where batches go.
    pub device: Device,
}

impl LoaderConfig {
    fn validate(&self) -> Result<()> {
        if self.seq_len == 0 || self.micro_batch == 0 || self.global_batch == 0 || self.rank >= self.size {
            return Err(Error::Config(format!("impossible loader settings: {self:?}")));
        }
        let at_once = self.size * self.micro_batch;
        if !self.global_batch.is_multiple_of(at_once) {
            let (global, size, micro) = (self.global_batch, self.size, self.micro_batch);
            return Err(Error::Config(format!(
                "a global batch of {global} sequences cannot be dealt to {size} ranks in micro-batches of {micro}; \
                 expected a multiple of {at_once}"
            )));
        }
        Ok(())
    }
}

/// Opens the data folder and gives the loaders of its training and held-out parts.
///
/// # Errors
/// As [`load_preprocessed_data`] and [`loaders_of`].
pub fn get_dataloaders(config: &LoaderConfig) -> Result<(TrainLoader, ValLoader)> {
    loaders_of(&load_preprocessed_data(&config.data_dir)?, config)
}

/// The loaders of data that is already open.
///
/// # Errors
/// Too little data for one global batch, or a global batch that cannot be dealt evenly.
pub fn loaders_of(data: &PreparedData, config: &LoaderConfig) -> Result<(TrainLoader, ValLoader)> {
    config.validate()?;
    let train = TrainLoader::new(data.train.clone(), config)?;
    let val = ValLoader::new(data.val.clone(), config)?;
    Ok((train, val))
}

/// Deals global batches of whole blocks. Which blocks a global batch holds depends on the seed and the epoch, not on the
/// number of ranks; over an epoch every block comes once, less those of the last partial batch, which is dropped. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub struct TrainLoader {
    dataset: TokenDataset,
    sampler: DistributedSampler,
    seq_len: usize,
    micro_batch: usize,
    steps_per_epoch: u64,
    device: Device,
}

impl TrainLoader {
    /// A loader for one rank.
    pub fn new(dataset: TokenDataset, config: &LoaderConfig) -> Result<Self> {
        config.validate()?;
        let (blocks, global) = (dataset.blocks(config.seq_len), config.global_batch);
        if blocks < global as u64 {
            let (tokens, needed) = (dataset.tokens(), global as u64 * config.seq_len as u64 + 1);
            let text = format!(
                "{tokens} tokens are {blocks} blocks of {}, too few for a global batch of {global} (at least {needed} \
                 tokens); prepare more text or make the batch smaller",
                config.seq_len
            );
            return Err(Error::data(dataset.path(), text));
        }
        let sampler = DistributedSampler::new(blocks, global, config.rank, config.size, config.seed, true)
            .map_err(|error| Error::Config(error.to_string()))?;
        Ok(Self {
            dataset,
            sampler,
            seq_len: config.seq_len,
            micro_batch: config.micro_batch,
            steps_per_epoch: blocks / global as u64,
            device: config.device,
        })
    }

    /// Global batches of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// This rank's part of global batch `step` of `epoch` (both from 0): micro-batches of (B, seq_len + 1), int64.
    ///
    /// # Errors
    /// A step past the epoch's end; a token outside the vocabulary.
    pub fn step(&self, epoch: u64, step: u64) -> Result<Vec<Tensor>> {
        if step >= self.steps_per_epoch {
            return Err(Error::Config(format!("step {step} asked of an epoch of {}", self.steps_per_epoch)));
        }
        let blocks = self.sampler.batch(epoch, step);
        let micro = |blocks: &[u64]| Ok(self.dataset.batch(self.seq_len, blocks)?.to_device(self.device));
        blocks.chunks(self.micro_batch).map(micro).collect()
    }

    /// The first global batch again and again.
    pub fn repeated(&self) -> BatchStream {
        let loader = self.clone();
        BatchStream(Box::new(std::iter::repeat_with(move || loader.step(0, 0))))
    }

    /// [`TrainLoader::step`] from this position on, epoch after epoch without end, read ahead by `workers` threads; by 0 when
    /// asked for. The batches do not depend on the number of threads.
    pub fn stream(&self, epoch: u64, step: u64, workers: usize) -> BatchStream {
        let (loader, per_epoch) = (self.clone(), self.steps_per_epoch);
        let positions = (0..).map(move |n| (epoch + (step + n) / per_epoch, (step + n) % per_epoch));
        let read = move |(epoch, step)| loader.step(epoch, step);
        BatchStream(match workers {
            0 => Box::new(positions.map(read)),
            _ => Box::new(Ordered::new(workers, workers, positions, read)),
        })
    }
}

/// Global batches one after the other, each as [`TrainLoader::step`] gives it.
pub struct BatchStream(Box<dyn Iterator<Item = Result<Vec<Tensor>>>>);

impl Iterator for BatchStream {
    type Item = Result<Vec<Tensor>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

impl std::fmt::Debug for BatchStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BatchStream").finish_non_exhaustive()
    }
}

/// Walks the whole held-out part: each of its tokens but the first is predicted once by exactly one rank, the last
/// partial block's too. Ranks may get different numbers of batches, so reduce sums after the walk, not within.
#[derive(Debug)]
pub struct ValLoader {
    dataset: TokenDataset,
    seq_len: usize,
    batch: usize,
    blocks: Range<u64>,
    device: Device,
}

impl ValLoader {
    /// A loader for one rank, in batches of `micro_batch` sequences, or more where sequences are short.
    ///
    /// # Errors
    /// Held-out data of fewer than two tokens.
    pub fn new(dataset: TokenDataset, config: &LoaderConfig) -> Result<Self> {
        config.validate()?;
        if dataset.predictions() == 0 {
            let text = "the held-out part needs at least 2 tokens; prepare it with a larger --val-fraction";
            return Err(Error::data(dataset.path(), text));
        }
        let batch = config.micro_batch.max(cheap_tokens(dataset.vocab_size()) / config.seq_len);
        let all = dataset.predictions().div_ceil(config.seq_len as u64);
        let share = |rank: usize| (u128::from(all) * rank as u128 / config.size as u128) as u64;
        Ok(Self {
            dataset,
            seq_len: config.seq_len,
            batch,
            blocks: share(config.rank)..share(config.rank + 1),
            device: config.device,
        })
    }

    /// Predictions of all ranks together: what the reduced count must come to.
    pub fn total_predictions(&self) -> u64 {
        self.dataset.predictions()
    }

    /// This rank's batches, (B, seq_len + 1); the last block of the text comes alone and may be shorter.
    pub fn batches(&self) -> ValBatches<'_> {
        ValBatches { loader: self, next: self.blocks.start }
    }
}

/// Tokens that a forward pass takes at once with little memory: of logits at most 16 MiB.
fn cheap_tokens(vocab_size: usize) -> usize {
    ((1 << 22) / vocab_size).min(1 << 12)
}

/// One walk over a rank's share of the held-out part.
#[derive(Debug)]
pub struct ValBatches<'a> {
    loader: &'a ValLoader,
    next: u64,
}

impl Iterator for ValBatches<'_> {
    type Item = Result<Tensor>;

    fn next(&mut self) -> Option<Self::Item> {
        let loader = self.loader;
        let whole = loader.dataset.blocks(loader.seq_len).min(loader.blocks.end);
        let start = self.next;
        let batch = if start < whole {
            self.next = whole.min(start + loader.batch as u64);
            loader.dataset.batch(loader.seq_len, &(start..self.next).collect::<Vec<_>>())
        } else if start < loader.blocks.end {
            self.next = start + 1;
            loader.dataset.block(loader.seq_len, start).map(|tokens| Tensor::from_slice(&tokens).unsqueeze(0))
        } else {
            return None;
        };
        Some(batch.map(|batch| batch.to_device(loader.device)))
    }
}
