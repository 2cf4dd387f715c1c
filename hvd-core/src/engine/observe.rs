//! What happens to a tensor on its way, for tests and timelines.

/// A station of a tensor's way through the engine, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Handed to the engine by this rank.
    Submitted,
    /// Agreed on by all ranks.
    Negotiated,
    /// Being copied into the buffer in which it travels.
    CopyIn,
    /// Its first byte may be on the wire from now on.
    Wire,
    /// Being copied back to where the user wants it.
    CopyOut,
    /// Its handle is complete.
    Done,
}

/// Is told of every station of every tensor of this rank, on the thread that drives the engine: it must be quick.
pub trait Observer: Send + Sync {
    /// `tensor` has reached `phase`.
    fn event(&self, tensor: &str, phase: Phase);
}
