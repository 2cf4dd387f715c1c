//! Which ranks share a host's memory.
//!
//! Ranks that believe to be on one host try to share memory, and that this succeeds is the proof.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::places::{Places, exchange};
use crate::error::Result;
use crate::shm::ShmGroup;
use crate::transport::Transport;
use crate::transport::subset::Subset;

/// The operations are the world's own; their messages within a host and between hosts meet no others.
pub(super) const WORLD: u32 = 0;

/// Which ranks share a host, seen from one of them.
///
/// The buffer travels between hosts in as many parts as the host with the fewest ranks has ranks: so each part has a rank on
/// every host that carries it, and the ranks of a host share the work. Part `p` is carried by the ranks with local number
/// `p`; those beyond take part within their host only.
pub struct Hosts {
    /// How the ranks of this host share memory; `None` where there is but one.
    pub(super) group: Option<Arc<ShmGroup>>,
    /// The ranks of this host, ascending.
    pub(super) local: Vec<usize>,
    /// This rank's position among them.
    pub(super) local_rank: usize,
    /// The ranks that carry the same part as this one, a rank for each host in the same order; empty if it carries none.
    pub(super) carriers: Vec<usize>,
    /// This rank's host among all.
    pub(super) host: usize,
    /// Number of hosts.
    pub(super) count: usize,
    /// Number of parts.
    parts: usize,
}

impl Hosts {
    /// Has the ranks of each host share memory, as [`ShmGroup::form`] does. `hosts`: the ranks of each, ascending; the same on
    /// all ranks, which call this at once. Gives `None` on all ranks if those of some host cannot.
    ///
    /// # Errors
    /// A lost peer, or one that does not take part in time.
    ///
    /// # Panics
    /// If this rank is on no host.
    pub fn form(
        transport: &mut dyn Transport,
        hosts: &[Vec<usize>],
        slot_bytes: usize,
        deadline: Instant,
    ) -> Result<Option<Hosts>> {
        let rank = transport.rank();
        let place = |(host, local): (usize, &Vec<usize>)| Some((host, local.iter().position(|&other| other == rank)?));
        let Some((host, local_rank)) = hosts.iter().enumerate().find_map(place) else {
            panic!("rank {rank} is on none of {hosts:?}")
        };
        let local = hosts[host].clone();
        let group = match local.len() {
            1 => None,
            _ => ShmGroup::form(&mut Subset::new(transport, &local, local_rank, WORLD), slot_bytes, deadline)?,
        };
        let formed = group.is_some() || local.len() == 1;
        if exchange(transport, 1, &[formed.into()])?.iter().any(|formed| formed != &[1]) {
            return Ok(None);
        }
        let parts = hosts.iter().map(Vec::len).min().unwrap_or(0);
        let carriers = hosts.iter().filter(|_| local_rank < parts).map(|local| local[local_rank]).collect();
        Ok(Some(Hosts { group, local, local_rank, carriers, host, count: hosts.len(), parts }))
    }

    /// How the ranks of this host share memory; `None` where there is but one.
    pub fn group(&self) -> Option<&Arc<ShmGroup>> {
        self.group.as_ref()
    }

    /// As [`ShmGroup::prepare_sleep`] for the ranks of this host.
    ///
    /// # Errors
    /// A lost peer.
    pub fn prepare_sleep(&self, transport: &mut dyn Transport) -> Result<bool> {
        match &self.group {
            Some(group) => group.prepare_sleep(&mut Subset::new(transport, &self.local, self.local_rank, WORLD)),
            None => Ok(true),
        }
    }

    /// How many chunks [`super::HierarchicalAllreduce::new`] wants: one for each host in each part.
    pub fn chunks(&self) -> usize {
        self.parts * self.count
    }

    /// The elements that the rank with this local number carries.
    pub(super) fn part(&self, chunks: &[Range<usize>], local_rank: usize) -> Range<usize> {
        match chunks.chunks(self.count).nth(local_rank) {
            Some(part) => part[0].start..part[part.len() - 1].end,
            None => 0..0,
        }
    }
}

/// How the ranks share memory.
#[derive(Clone)]
pub enum Sharing {
    /// Not at all.
    None,
    /// All of them.
    All(Arc<ShmGroup>),
    /// Those of each host.
    Within(Arc<Hosts>),
}

impl Sharing {
    /// The memory that all ranks share.
    pub fn all(&self) -> Option<&Arc<ShmGroup>> {
        match self {
            Sharing::All(group) => Some(group),
            Sharing::None | Sharing::Within(_) => None,
        }
    }

    /// The hosts, where some ranks share memory and others do not.
    pub fn hosts(&self) -> Option<&Arc<Hosts>> {
        match self {
            Sharing::Within(hosts) => Some(hosts),
            Sharing::None | Sharing::All(_) => None,
        }
    }

    /// The memory that this rank shares with some others.
    pub fn group(&self) -> Option<&Arc<ShmGroup>> {
        self.all().or_else(|| self.hosts()?.group())
    }
}

/// Has the ranks of each host share memory, with slots of `slot_bytes`. To be called by all ranks at once. Where a host fails,
/// nobody shares.
///
/// # Errors
/// A lost peer, or one that does not take part in time.
pub fn share(transport: &mut dyn Transport, places: &Places, slot_bytes: usize, deadline: Instant) -> Result<Sharing> {
    let hosts = places.by_host();
    if hosts.len() == 1 {
        let group = ShmGroup::form(transport, slot_bytes, deadline)?;
        return Ok(group.map_or(Sharing::None, Sharing::All));
    }
    if hosts.len() == transport.size() {
        return Ok(Sharing::None);
    }
    let hosts = Hosts::form(transport, &hosts, slot_bytes, deadline)?;
    Ok(hosts.map_or(Sharing::None, |hosts| Sharing::Within(Arc::new(hosts))))
}
