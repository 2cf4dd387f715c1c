//! Where the ranks run, as each of them says.
//!
//! What a launcher says of hosts is not asked: containers and namespaces may have divided them.

use std::ops::Range;

use rustix::thread::{CpuSet, sched_getaffinity};
use sha2::{Digest, Sha256};

use super::Allgather;
use crate::error::Result;
use crate::memory::Memory;
use crate::transport::{Tag, Transport};

/// The channel of these messages, before an engine has begun: "host".
const CHANNEL: u32 = 0x686f_7374;

/// Bytes of a digest.
const DIGEST_BYTES: usize = 16;
const KERNEL: Range<usize> = 0..DIGEST_BYTES;
const NAMESPACE: Range<usize> = KERNEL.end..KERNEL.end + DIGEST_BYTES;
const PROCESSORS: Range<usize> = NAMESPACE.end..NAMESPACE.end + CpuSet::MAX_CPU / 8;

/// Where the ranks of a world run.
pub struct Places {
    rank: usize,
    places: Vec<Place>,
}

/// What one rank says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Tells running kernels apart. A rank that cannot say has one of its own.
    kernel: [u8; DIGEST_BYTES],
    /// Tells network namespaces apart: abstract sockets are not seen beyond one.
    namespace: [u8; DIGEST_BYTES],
    /// A bit for each processor that it may use; none if it does not know.
    processors: [u8; CpuSet::MAX_CPU / 8],
}

impl Places {
    /// Has all ranks say where they run; to be called by all of them at once.
    ///
    /// # Errors
    /// A lost peer.
    pub fn gather(transport: &mut dyn Transport) -> Result<Places> {
        let all = exchange(transport, 0, &Place::own().encode())?;
        Ok(Places { rank: transport.rank(), places: all.iter().map(|bytes| Place::decode(bytes)).collect() })
    }

    /// The ranks that believe to be on one host, for each host, ascending, the hosts in the order of their first ranks.
    pub(super) fn by_host(&self) -> Vec<Vec<usize>> {
        let mut hosts: Vec<Vec<usize>> = Vec::new();
        for (rank, place) in self.places.iter().enumerate() {
            match hosts.iter_mut().find(|local| self.places[local[0]].is_beside(place)) {
                Some(local) => local.push(rank),
                None => hosts.push(vec![rank]),
            }
        }
        hosts
    }

    /// Whether the ranks under this rank's kernel are more than the processors that they may use: then a rank that waits had
    /// better give its processor away.
    pub fn are_crowded(&self) -> bool {
        let kernel = self.places[self.rank].kernel;
        let near: Vec<_> = self.places.iter().filter(|place| place.kernel == kernel).collect();
        let known = near.iter().all(|place| place.processors.iter().any(|&byte| byte != 0));
        let union = (0..PROCESSORS.len()).map(|at| near.iter().fold(0, |byte, place| byte | place.processors[at]));
        known && near.len() > union.map(|byte: u8| byte.count_ones() as usize).sum()
    }
}

impl Place {
    fn own() -> Place {
        let kernel = std::fs::read("/proc/sys/kernel/random/boot_id").ok();
        let namespace = std::fs::read_link("/proc/self/ns/net").ok();
        let namespace = namespace.map(|path| path.into_os_string().into_encoded_bytes());
        Place { kernel: digest(kernel), namespace: digest(namespace), processors: processors() }
    }

    /// Whether two ranks believe to be on one host.
    fn is_beside(&self, other: &Place) -> bool {
        (self.kernel, self.namespace) == (other.kernel, other.namespace)
    }

    fn encode(&self) -> Vec<u8> {
        [&self.kernel[..], &self.namespace, &self.processors].concat()
    }

    fn decode(bytes: &[u8]) -> Place {
        let [mut kernel, mut namespace] = [[0; DIGEST_BYTES]; 2];
        let mut processors = [0; PROCESSORS.end - PROCESSORS.start];
        kernel.copy_from_slice(&bytes[KERNEL]);
        namespace.copy_from_slice(&bytes[NAMESPACE]);
        processors.copy_from_slice(&bytes[PROCESSORS]);
        Place { kernel, namespace, processors }
    }
}

/// A digest of something, or random bytes where it is not known. Should the system have none of those, ranks try in vain to share
/// memory, and do not.
fn digest(of: Option<Vec<u8>>) -> [u8; DIGEST_BYTES] {
    let mut digest = [0; DIGEST_BYTES];
    match of {
        Some(bytes) => digest.copy_from_slice(&Sha256::digest(bytes)[..DIGEST_BYTES]),
        None => drop(getrandom::fill(&mut digest)),
    }
    digest
}

fn processors() -> [u8; CpuSet::MAX_CPU / 8] {
    let mut bits = [0; CpuSet::MAX_CPU / 8];
    if let Ok(set) = sched_getaffinity(None) {
        (0..CpuSet::MAX_CPU).filter(|&at| set.is_set(at)).for_each(|at| bits[at / 8] |= 1 << (at % 8));
    }
    bits
}

/// Everybody's `own`, of the same length on all ranks, by rank.
pub(super) fn exchange(transport: &mut dyn Transport, sequence: u32, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    let (rank, size) = (transport.rank(), transport.size());
    let mut all = vec![0; size * own.len()];
    all[rank * own.len()..][..own.len()].copy_from_slice(own);
    let all = Memory::from_vec(all);
    let ranges = (0..size).map(|rank| rank * own.len()..(rank + 1) * own.len()).collect();
    let tag = Tag { channel: CHANNEL, sequence };
    super::run(&mut Allgather::new(rank, size, all.clone(), ranges, tag, own.len()), transport)?;
    // SAFETY: the operation is done.
    let all: Vec<u8> = unsafe { all.into_vec() };
    Ok(all.chunks(own.len()).map(<[u8]>::to_vec).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks on kernels and namespaces named by letters, each with the processors of its mask.
    fn places(rank: usize, ranks: &[(u8, u8, u8)]) -> Places {
        let place = |&(kernel, namespace, mask): &(u8, u8, u8)| {
            let mut processors = [0; PROCESSORS.end - PROCESSORS.start];
            processors[100] = mask;
            Place { kernel: [kernel; 16], namespace: [namespace; 16], processors }
        };
        Places { rank, places: ranks.iter().map(place).collect() }
    }

    #[test]
    fn ranks_of_one_kernel_and_namespace_are_on_one_host() {
        let ranks = [(b'a', 1, 3), (b'b', 1, 3), (b'a', 1, 3), (b'a', 2, 3), (b'b', 1, 3)];
        assert_eq!(places(0, &ranks).by_host(), [vec![0, 2], vec![1, 4], vec![3]]);
    }

    #[test]
    fn ranks_are_crowded_where_they_outnumber_the_processors_that_any_of_them_may_use() {
        assert!(!places(0, &[(b'a', 1, 0b01), (b'a', 1, 0b10)]).are_crowded(), "each is bound to its own");
        assert!(places(0, &[(b'a', 1, 0b01), (b'a', 1, 0b01)]).are_crowded(), "both are bound to one");
        assert!(places(0, &[(b'a', 1, 0b11), (b'a', 2, 0b11), (b'a', 1, 0b11)]).are_crowded(), "hosts of one machine");
        assert!(!places(0, &[(b'a', 1, 0b11), (b'b', 1, 0b11), (b'a', 1, 0b11)]).are_crowded(), "another machine");
        assert!(!places(0, &[(b'a', 1, 0), (b'a', 1, 1)]).are_crowded(), "one does not know");
    }

    #[test]
    fn a_rank_says_the_same_each_time_and_is_understood() {
        let own = Place::own();
        assert_eq!(own, Place::own());
        assert_eq!(Place::decode(&own.encode()), own);
        assert!(own.processors.iter().any(|&byte| byte != 0));
    }
}
