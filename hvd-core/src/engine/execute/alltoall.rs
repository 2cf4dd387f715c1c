//! A block of rows from every rank to every rank.

use std::sync::Arc;

use super::{Finished, Operation, allgather};
use crate::collective::{BruckAlltoall, Collective, PairwiseAlltoall, Splits};
use crate::engine::backend::Backend;
use crate::engine::fusion::Batch;
use crate::engine::submission::{OpKind, Output, Submission};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::shm::{ShmAlltoall, ShmGroup};
use crate::transport::{Tag, Transport};

/// Blocks up to this size take passing ranks along, in bytes: a message costs more than they do.
const BRUCK_BLOCK_BYTES: usize = 512;

/// With fewer ranks than this the exchange in pairs takes no more messages one after the other.
const BRUCK_RANKS: usize = 8;

/// Prepares the exchange of one tensor's blocks. How many rows go where is not negotiated, as it may differ from one step to
/// the next: the ranks gather all splits first.
pub(super) fn start(batch: &mut Batch, backend: &mut Backend) -> Result<Box<dyn Operation>> {
    let Batch { items, segment_bytes, .. } = batch;
    let submission = &mut items[0].submission;
    let own = own_splits(submission, backend.size);
    let row_bytes = submission.shape[1..].iter().product::<usize>() * submission.dtype.size();
    let own: Vec<_> = own.into_iter().map(|rows| rows as i64).collect();
    let input = Memory::from_vec(own);
    let gathered = Memory::zeroed(input.len() * backend.size);
    let ranges = (0..backend.size).map(|rank| rank * input.len()..(rank + 1) * input.len()).collect();
    let gathering = allgather::collective(input, gathered.clone(), ranges, *segment_bytes, backend)?;
    let exchange = Exchange {
        rank: backend.rank,
        ranks: backend.size,
        input: submission.input.clone(),
        output: std::mem::replace(&mut submission.output, Output::InPlace),
        row_bytes,
        shared: backend.shared.clone(),
        tag: backend.next_tag(),
        segment_bytes: *segment_bytes,
    };
    Ok(Box::new(Alltoall::Gathering { gathering, gathered, exchange: Some(exchange) }))
}

/// How many rows of this rank go to each.
fn own_splits(submission: &Submission, ranks: usize) -> Vec<usize> {
    match &submission.kind {
        OpKind::Alltoall { splits: Some(splits) } => splits.clone(),
        _ => vec![submission.shape[0] / ranks; ranks],
    }
}

enum Alltoall {
    /// The splits are under way.
    Gathering { gathering: Box<dyn Collective>, gathered: Memory, exchange: Option<Exchange> },
    /// The blocks are under way.
    Exchanging { exchanging: Box<dyn Collective>, output: Memory, rows: Vec<usize> },
}

/// What it takes to exchange the blocks once all splits are known.
struct Exchange {
    rank: usize,
    ranks: usize,
    input: Memory,
    output: Output,
    row_bytes: usize,
    shared: Option<Arc<ShmGroup>>,
    tag: Tag,
    segment_bytes: usize,
}

impl Exchange {
    /// `gathered`: every rank's splits, in rows.
    fn begin(self, gathered: &[i64]) -> Result<Alltoall> {
        let Exchange { rank, ranks, input, output, row_bytes, shared, tag, segment_bytes } = self;
        let bytes = |&rows: &i64| usize::try_from(rows).ok().and_then(|rows| rows.checked_mul(row_bytes));
        let bytes: Option<Vec<_>> = gathered.iter().map(bytes).collect();
        let bytes = bytes.ok_or_else(|| Error::Invalid("alltoall of more bytes than there are addresses".into()))?;
        let splits = Splits::new(&bytes.chunks(ranks).map(<[usize]>::to_vec).collect::<Vec<_>>())?;
        let rows = gathered.iter().skip(rank).step_by(ranks).map(|&rows| rows as usize).collect();
        let received = splits.received(rank).last().map_or(0, |last| last.end);
        let output = output.resolve(&input, received);
        let exchanging: Box<dyn Collective> = match shared {
            Some(group) => Box::new(ShmAlltoall::new(group, &splits, input, output.clone())?),
            None if ranks >= BRUCK_RANKS && splits.largest() <= BRUCK_BLOCK_BYTES => {
                Box::new(BruckAlltoall::new(rank, splits, input, output.clone(), tag)?)
            }
            None => Box::new(PairwiseAlltoall::new(rank, &splits, input, output.clone(), tag, segment_bytes)?),
        };
        Ok(Alltoall::Exchanging { exchanging, output, rows })
    }
}

impl Operation for Alltoall {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if let Alltoall::Gathering { gathering, gathered, exchange } = self {
            if !gathering.poll(transport)? {
                return Ok(false);
            }
            // SAFETY: the splits have been gathered, and nobody else knows of the memory.
            let splits: Vec<i64> = unsafe { gathered.clone().into_vec() };
            if let Some(exchange) = exchange.take() {
                *self = exchange.begin(&splits)?;
            }
        }
        match self {
            Alltoall::Gathering { .. } => Ok(false),
            Alltoall::Exchanging { exchanging, .. } => exchanging.poll(transport),
        }
    }

    fn is_preparing(&self) -> bool {
        matches!(self, Alltoall::Gathering { .. })
    }

    fn finish(self: Box<Self>) -> Finished {
        match *self {
            Alltoall::Gathering { .. } => Finished::default(),
            Alltoall::Exchanging { exchanging, output, rows } => {
                drop(exchanging);
                Finished { outputs: vec![output], first_dims: vec![rows], buffer: None }
            }
        }
    }
}
