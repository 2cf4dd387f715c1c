//! What carries out the collectives of one set of ranks, and the numbers it needs.

use std::sync::Arc;

use super::fusion::Route;
use super::message::SignatureKind;
use super::submission::{OpKind, Output, Submission};
use crate::collective::{Hosts, Sharing};
use crate::config::Config;
use crate::memory::Memory;
use crate::shm::{DIRECT_BYTES, Place, ShmGroup};
use crate::transport::Tag;
use crate::transport::subset::channel;

/// What the operations of a set of ranks share.
pub(crate) struct Backend {
    /// This rank in the set.
    pub(super) rank: usize,
    pub(super) size: usize,
    /// The set's ranks as the world numbers them.
    pub(super) members: Arc<[usize]>,
    /// The memory that all ranks of the set share, if they are on one host.
    pub(super) shared: Option<Arc<ShmGroup>>,
    /// The hosts, if they are on several and ranks of one share memory. Only the world's own set has them.
    pub(super) hosts: Option<Arc<Hosts>>,
    pub(super) segment_bytes: usize,
    pub(super) doubling_limit_bytes: usize,
    /// Numbers the operations, so that their messages do not meet.
    sequence: u32,
    /// A buffer of a batch that is done, for the next.
    spare: Option<Memory>,
}

impl Backend {
    pub(super) fn new(rank: usize, members: Arc<[usize]>, sharing: Sharing, config: &Config) -> Self {
        Backend {
            rank,
            size: members.len(),
            members,
            shared: sharing.all().cloned(),
            hosts: sharing.hosts().cloned(),
            segment_bytes: config.segment_bytes,
            doubling_limit_bytes: config.doubling_limit_bytes,
            sequence: 0,
            spare: None,
        }
    }

    /// The place in the set of a rank of the world.
    pub(super) fn position(&self, rank: usize) -> Option<usize> {
        self.members.iter().position(|&member| member == rank)
    }

    /// How a tensor of so many bytes travels. `in_place`: it lies in the same shared buffer on all ranks.
    pub(super) fn route(&self, kind: &SignatureKind, bytes: usize, in_place: bool) -> Route {
        match kind {
            _ if in_place => Route::InPlace,
            SignatureKind::Allreduce(options) if !options.op.is_elementwise() => Route::Ring,
            _ if self.shared.is_some() => Route::Shared,
            SignatureKind::Allreduce(_) if bytes <= self.doubling_limit_bytes => Route::Doubling,
            SignatureKind::Allreduce(_) if self.hosts.is_some() => Route::Hierarchical,
            _ => Route::Ring,
        }
    }

    /// Where a tensor lies that can be reduced in place: in a buffer that the ranks share, and as it travels.
    pub(super) fn place(&self, submission: &Submission) -> Option<Place> {
        let group = self.shared.as_ref()?;
        let (OpKind::Allreduce(options), Output::InPlace) = (&submission.kind, &submission.output) else { return None };
        let plain = options.prescale == 1.0 && options.compression.wire_dtype(submission.dtype) == submission.dtype;
        let small = submission.input.len().saturating_mul(self.size) <= DIRECT_BYTES;
        if plain && options.op.is_elementwise() && !small { group.place(&submission.input) } else { None }
    }

    pub(super) fn next_tag(&mut self) -> Tag {
        self.sequence = self.sequence.wrapping_add(1);
        Tag { channel: channel::OPERATIONS, sequence: self.sequence }
    }

    pub(super) fn take_buffer(&mut self) -> Option<Memory> {
        self.spare.take()
    }

    /// Keeps a buffer for the next batch.
    pub(super) fn give_buffer(&mut self, buffer: Option<Memory>) {
        self.spare = buffer.or(self.spare.take());
    }
}
