//! Keys and values of the tokens a generation has seen.

use tch::{Device, Kind, Tensor};

use super::ModelConfig;
use super::fused::{self, Span};

/// Keys and values of one layer, with room for the longest sequence.
#[derive(Debug)]
pub(super) struct LayerCache {
    keys: Tensor,   // (B, H, room, hs)
    values: Tensor, // (B, H, room, hs)
    len: i64,
}

impl LayerCache {
    /// Adds `T` tokens' keys and values (B, H, T, hs) and gives those of all tokens so far, (B, H, S, hs).
    pub(super) fn append(&mut self, keys: &Tensor, values: &Tensor) -> (Tensor, Tensor) {
        let added = keys.size()[2];
        self.keys.narrow(2, self.len, added).copy_(keys);
        self.values.narrow(2, self.len, added).copy_(values);
        self.len += added;
        (self.keys.narrow(2, 0, self.len), self.values.narrow(2, 0, self.len))
    }

    /// Whether [`LayerCache::spans`] can be had.
    pub(super) fn is_served(&self) -> bool {
        fused::is_served(&self.keys) && fused::is_served(&self.values)
    }

    /// Makes place for a token, whose keys and values the caller writes; gives how many there are with it.
    pub(super) fn grow(&mut self) -> usize {
        self.len += 1;
        self.len as usize
    }

    /// B, H, room and hs.
    pub(super) fn shape(&self) -> [usize; 4] {
        let size = self.keys.size();
        std::array::from_fn(|at| size[at] as usize)
    }

    /// All keys and values, (B, H, room, hs).
    pub(super) fn spans(&self) -> (Span<f32>, Span<f32>) {
        (Span::of(&self.keys), Span::of(&self.values))
    }
}

/// What a model remembers of a batch of sequences between calls of
/// [`TransformerLM::hidden_cached`](super::TransformerLM::hidden_cached).
#[derive(Debug)]
pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
    room: i64,
}

impl KvCache {
    /// Room for `batch` sequences of `room` tokens. `kind` is that of the keys: the parameters', or autocast's.
    pub fn new(config: &ModelConfig, batch: i64, room: i64, kind: Kind, device: Device) -> Self {
        let shape = [batch, config.n_heads as i64, room, (config.d_model / config.n_heads) as i64];
        let empty = || Tensor::empty(shape, (kind, device));
        let layer = |_| LayerCache { keys: empty(), values: empty(), len: 0 };
        Self { layers: (0..config.n_layers).map(layer).collect(), room }
    }

    /// Tokens remembered of each sequence.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sequences.
    pub(super) fn rows(&self) -> i64 {
        self.layers.first().map_or(0, |layer| layer.keys.size()[0])
    }

    /// Tokens that there is room for.
    pub fn room(&self) -> i64 {
        self.room
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.len = 0);
    }
}
