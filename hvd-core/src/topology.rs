//! Who am I: rank, size, and where the others are, from the launcher's variables.

/// A rank's place in its world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// This rank, `0 .. size`.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// This rank among those of its host, `0 .. local_size`.
    pub local_rank: usize,
    /// Number of ranks on this host.
    pub local_size: usize,
    /// This rank's host among those that have this local rank, `0 .. cross_size`.
    pub cross_rank: usize,
    /// Number of hosts that have this local rank.
    pub cross_size: usize,
}
