//! The decoder-only transformer, in GPT-2's arrangement: learned positions (or sinusoidal ones), normalisation before each part,
//! tanh GELU, biases everywhere, a head that shares the embedding's weights.
//!
//! ```
//! use tch::{Device, Kind, Tensor, nn};
//! use transformer_lm::model::{ModelConfig, TransformerLM};
//!
//! # fn main() -> transformer_lm::Result<()> {
//! let shape = ModelConfig { vocab_size: 256, d_model: 32, n_heads: 4, n_layers: 2, d_ff: 64, ..Default::default() };
//! let store = nn::VarStore::new(Device::Cpu);
//! let model = TransformerLM::new(&store.root(), &shape, 42)?;
//! let ids = Tensor::randint(256, [3, 16], (Kind::Int64, Device::Cpu));
//! let (logits, loss) = model.forward_t(&ids, None, Some(&ids), false)?;
//! assert_eq!(logits.size(), [3, 16, 256]);
//! assert!(loss.is_some());
//! # Ok(())
//! # }
//! ```

mod backward;
mod block;
mod cache;
mod config;
mod decode;
mod dropout;
pub mod fused;
mod init;
mod loss;
mod matrix;
mod positions;
pub mod random;
pub mod sampling;
mod step;
mod weights;

use hvd_torch::Autocast;
use tch::{Device, Kind, Tensor, nn};

use crate::{Error, Result};

use block::{Block, LayerNorm, Stream};
use fused::Attend;
use init::Init;
use matrix::Matrix;
pub use matrix::StepWeights;

pub use backward::Backward;
pub use block::LAYER_NORM_EPS;
pub use cache::KvCache;
pub use config::{ModelConfig, Positions};
pub use decode::{Generation, GenerationParams};
pub use dropout::Dropout;
pub use loss::{IGNORE_INDEX, LossSums};
pub(crate) use weights::not_written;
pub use weights::{copy_weights, read_weights, write_weights};

/// Standard deviation of the first weights.
const STD: f64 = 0.02;

/// A GPT. Its parameters live in the store it was made in, under GPT-2's names: `wte.weight` (vocabulary, D),
/// `wpe.weight` (positions, D; only where positions are learned), `h.0.ln_1.weight`, `h.0.attn.c_attn.weight` (3D, D: queries, keys, values),
/// `h.0.attn.c_proj.weight`, `h.0.ln_2.weight`, `h.0.mlp.c_fc.weight` (F, D), `h.0.mlp.c_proj.weight` (D, F) and so on,
/// `ln_f.weight`, each with its bias. Dense weights are stored (out, in), as torch's Linear does.
#[derive(Debug)]
pub struct TransformerLM {
    /// The embedding, which is also the head.
    wte: Matrix,
    /// (max_seq_len, D); a parameter where positions are learned.
    wpe: Tensor,
    blocks: Vec<Block>,
    ln_f: LayerNorm,
    config: ModelConfig,
    parameters: Vec<(String, Tensor)>,
}

impl TransformerLM {
    /// Makes the parameters below `vs` with weights drawn from `seed`: N(0, 0.02²), the projections into the residual
    /// stream N(0, (0.02/√(2·layers))²), biases 0. They are the same on every device and (rounded) in every element type.
    ///
    /// # Errors
    /// Where [`ModelConfig::validate`] refuses `config`.
    pub fn new(vs: &nn::Path, config: &ModelConfig, seed: u64) -> Result<Self> {
        Self::build(vs, config, Init::new(Some(seed)))
    }

    /// As [`TransformerLM::new`] with all weights 0, to copy others into ([`copy_weights`]).
    ///
    /// # Errors
    /// Where [`ModelConfig::validate`] refuses `config`.
    pub fn blank(vs: &nn::Path, config: &ModelConfig) -> Result<Self> {
        Self::build(vs, config, Init::new(None))
    }

    fn build(vs: &nn::Path, config: &ModelConfig, mut init: Init) -> Result<Self> {
        config.validate()?;
        if vs.device() == Device::Cpu {
            // Positions that are not learned are no parameters, and made in f64.
            let table = match config.positions {
                Positions::Learned => 0,
                Positions::Sinusoidal => config.max_seq_len.saturating_mul(config.d_model),
            };
            let weights = config.parameter_count().saturating_mul(vs.kind().elt_size_in_bytes());
            crate::memory::check_room(weights.saturating_add(table.saturating_mul(size_of::<f64>())))?;
        }
        let d = config.d_model;
        let wte = Matrix::new(init.normal(&(vs / "wte"), "weight", &[config.vocab_size, d], STD));
        let wpe = match config.positions {
            Positions::Learned => init.normal(&(vs / "wpe"), "weight", &[config.max_seq_len, d], STD),
            Positions::Sinusoidal => positions::sinusoidal(config.max_seq_len, d, vs.kind(), vs.device()),
        };
        let blocks = (0..config.n_layers).map(|i| Block::new(&mut init, &(vs / "h" / i), config)).collect();
        let ln_f = LayerNorm::new(&mut init, &(vs / "ln_f"), d);
        Ok(Self { wte, wpe, blocks, ln_f, config: config.clone(), parameters: init.parameters })
    }

    /// Keeps a second copy of the dense weights and the head's, rounded, from which the steps of a generation of few sequences are
    /// computed: on a CPU they take as long as it takes to read the weights. Prompts are still read with the weights as they are.
    ///
    /// # Errors
    /// A model that is not on the CPU.
    pub fn narrow_weights(&mut self, weights: StepWeights) -> Result<()> {
        let mut all = self.blocks.iter_mut().flat_map(Block::weights).chain([&mut self.wte]);
        all.try_for_each(|matrix| matrix.narrow(weights))
    }

    /// Asks the system to keep the weights that the steps of a generation read in large pages, on a CPU. Call it after
    /// [`TransformerLM::narrow_weights`].
    pub fn use_large_pages(&mut self) {
        self.blocks.iter_mut().flat_map(Block::weights).for_each(|weight| weight.use_large_pages());
        self.wte.use_large_pages();
    }

    /// The shape it was made with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// All parameters with their names, in an order that is the same in every process.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// What is added to the tokens' embeddings, (max_seq_len, D); a parameter only where positions are learned.
    pub fn positions(&self) -> Tensor {
        self.wpe.shallow_clone()
    }

    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.wte.values.device()
    }

    /// The parameters' element type.
    pub fn kind(&self) -> Kind {
        self.wte.values.kind()
    }

    /// The logits (B, T, vocabulary) of `input_ids` (B, T), int64, and, where `labels` (B, T) are given, the mean loss
    /// in nats.
    ///
    /// `attention_mask` (B, T) is 1 where a token may be looked at and 0 where it is padding. Labels are shifted inside:
    /// the logits at `t` are judged by the label at `t + 1`; a label of −100 is left out. `train` switches dropout on,
    /// whose masks follow from torch's generator.
    ///
    /// # Errors
    /// Shapes that do not fit, sequences longer than `max_seq_len`, ids or labels outside the vocabulary.
    pub fn forward_t(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        labels: Option<&Tensor>,
        train: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let logits = self.logits(&self.hidden(input_ids, attention_mask, train)?);
        let loss = labels.map(|labels| self.shifted_loss(&logits, labels)).transpose()?;
        Ok((logits, loss))
    }

    /// The last layer's normalised output (B, T, D) for `input_ids` (B, T). Under autocast to bf16 it may be in bf16.
    pub fn hidden(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let dropout = if train { self.draw_dropout(input_ids)? } else { Dropout::none() };
        self.hidden_dropping(input_ids, attention_mask, &dropout)
    }

    /// Dropout of these sequences, with keys from torch's generator.
    fn draw_dropout(&self, input_ids: &Tensor) -> Result<Dropout> {
        match self.config.dropout > 0.0 {
            true => Dropout::drawn(self.config.dropout, token_shape(input_ids)?.0),
            false => Ok(Dropout::none()),
        }
    }

    fn hidden_dropping(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let x = self.embed(input_ids, 0, dropout)?; // (B, T, D)
        let attend = match attention_mask {
            None => Attend::Causal,
            Some(mask) => Attend::Masked(combined_mask(input_ids, mask)?),
        };
        let mut stream = Stream::new(x);
        for (layer, block) in self.blocks.iter().enumerate() {
            stream = block.forward(stream, &attend, None, &of_block(dropout, layer))?;
        }
        Ok(self.ln_f.forward(stream)?.1)
    }

    /// As [`TransformerLM::hidden`], for tokens that follow those in `cache`, which then holds these too. Without
    /// gradients and dropout.
    pub fn hidden_cached(&self, input_ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        tch::no_grad(|| self.forward_cached(input_ids, cache))
    }

    /// The logits of what follows `input_ids` (B, T), which follow the tokens in `cache` and join them: those of each sequence's last
    /// token, one sequence after the other, in f32.
    ///
    /// # Errors
    /// As [`TransformerLM::hidden_cached`].
    pub fn next_logits(&self, input_ids: &Tensor, cache: &mut KvCache) -> Result<Vec<f32>> {
        if self.serves_step(input_ids, cache) {
            let ids = Vec::<i64>::try_from(input_ids.view([-1]))?;
            let known = |id: i64| usize::try_from(id).ok().filter(|&id| id < self.config.vocab_size);
            let ids: Option<Vec<usize>> = ids.into_iter().map(known).collect();
            return self.step(&ids.ok_or_else(|| self.bad_ids(input_ids))?, cache);
        }
        let hidden = self.hidden_cached(input_ids, cache)?; // (B, T, D)
        let logits = tch::no_grad(|| self.logits(&hidden.narrow(1, -1, 1))); // (B, 1, vocabulary)
        Ok(Vec::<f32>::try_from(logits.to_kind(Kind::Float).contiguous().view([-1]))?)
    }

    fn forward_cached(&self, input_ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (past, added) = (cache.len(), token_shape(input_ids)?.1);
        if past + added > cache.room() {
            let room = cache.room();
            return Err(Error::Config(format!("{past} + {added} tokens do not fit into a cache of {room}")));
        }
        let x = self.embed(input_ids, past, &Dropout::none())?; // (B, T, D)
        let attend = match (past, added) {
            (0, _) => Attend::Causal,
            (_, 1) => Attend::All,
            _ => Attend::Masked(causal_mask(added, past + added, x.device())),
        };
        let mut stream = Stream::new(x);
        for (block, layer) in self.blocks.iter().zip(&mut cache.layers) {
            stream = block.forward(stream, &attend, Some(layer), &Dropout::none())?;
        }
        Ok(self.ln_f.forward(stream)?.1)
    }

    /// (B, T, D) to (B, T, vocabulary), by the embedding's weights.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        match Autocast::kind(self.device()) {
            Some(_) => hidden.linear::<Tensor>(&self.wte.values, None),
            None => hidden.to_kind(self.kind()).linear::<Tensor>(&self.wte.values, None),
        }
    }

    /// Tokens and positions from `start` on: (B, T) to (B, T, D).
    fn embed(&self, input_ids: &Tensor, start: i64, dropout: &Dropout) -> Result<Tensor> {
        let (_, t) = token_shape(input_ids)?;
        let longest = self.config.max_seq_len as i64;
        if start + t > longest {
            let text = format!("a sequence of {} tokens; this model sees at most {longest} (max_seq_len)", start + t);
            return Err(Error::Config(text));
        }
        let tokens = fused::embedding(&self.wte.values, input_ids).map_err(|_| self.bad_ids(input_ids))?;
        let positions = self.wpe.narrow(0, start, t); // (T, D)
        dropout.at(EMBEDDING).apply(tokens + positions)
    }

    fn bad_ids(&self, ids: &Tensor) -> Error {
        let (low, high) = (ids.min().int64_value(&[]), ids.max().int64_value(&[]));
        let vocabulary = self.config.vocab_size;
        Error::Config(format!("token ids from {low} to {high}; this model's vocabulary is 0 to {}", vocabulary - 1))
    }
}

/// The embedding among the parts of a model that have dropout; the blocks follow.
const EMBEDDING: u64 = 0;

fn of_block(dropout: &Dropout, layer: usize) -> Dropout {
    dropout.at(EMBEDDING + 1 + layer as u64)
}

/// `(B, T)` of ids, or why they are none.
fn token_shape(ids: &Tensor) -> Result<(i64, i64)> {
    match (ids.kind(), &ids.size()[..]) {
        (Kind::Int64, &[b, t]) if b > 0 && t > 0 => Ok((b, t)),
        (kind, shape) => Err(Error::Config(format!(
            "token ids of {kind:?} {shape:?}; expected Int64 (sequences, tokens), not empty"
        ))),
    }
}

/// (T, S): row `i` sees all but the last `T − 1 − i` columns.
fn causal_mask(t: i64, s: i64, device: Device) -> Tensor {
    Tensor::ones([t, s], (Kind::Bool, device)).tril(s - t)
}

/// Causal and padding masks in one, (B, 1, T, T). Every position sees itself, so that no row is empty: what padding
/// computes is read by nobody, but it must not be NaN.
fn combined_mask(ids: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
    let (b, t) = token_shape(ids)?;
    if attention_mask.size() != [b, t] {
        let shape = attention_mask.size();
        return Err(Error::Config(format!(
            "attention_mask of {shape:?} for token ids of [{b}, {t}]; expected the same"
        )));
    }
    let itself = Tensor::eye(t, (Kind::Bool, ids.device())); // (T, T)
    let visible = attention_mask.ne(0).view([b, 1, 1, t]).logical_or(&itself); // (B, 1, T, T)
    Ok(visible.logical_and(&causal_mask(t, t, ids.device())))
}
