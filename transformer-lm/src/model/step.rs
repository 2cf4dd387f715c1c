//! A step of a generation on the CPU: one token more of each of a few sequences, in f32, without tensors in between. Calls of torch's
//! functions would take as long as the arithmetic in small models.
//!
//! Letters in comments: `B` sequences, `D` width, `H` heads, `hs` width of a head, `F` feed-forward width, `S` tokens seen.

use lm_kernels::{Norm, add_rows, bias_gelu, causal_softmax, multiply, normalise, weighted_sum};
use tch::Tensor;

use super::TransformerLM;
use super::block::{Attention, Block, LAYER_NORM_EPS, LayerNorm, Linear, Mlp};
use super::cache::{KvCache, LayerCache};
use super::fused::{Span, is_served};
use super::matrix::{GRAIN, for_each};
use crate::Result;

/// For more sequences at once torch's products are faster.
const MOST_ROWS: i64 = 4;

impl TransformerLM {
    /// Whether [`TransformerLM::step`] can serve `ids` (B, T) after the tokens in `cache`.
    pub(super) fn serves_step(&self, ids: &Tensor, cache: &KvCache) -> bool {
        let is_step = matches!(ids.size()[..], [rows, 1] if rows <= MOST_ROWS && cache.rows() == rows);
        let has_room = !cache.is_empty() && cache.len() < cache.room().min(self.wpe.size()[0]);
        let is_f32 = is_served(&self.wte.values) && is_served(&self.wpe);
        is_step && has_room && is_f32 && cache.layers.iter().all(LayerCache::is_served)
    }

    /// The logits after `ids`, one of each sequence in `cache`, which then holds these too: B times as many as the vocabulary has.
    ///
    /// # Panics
    /// For ids outside the vocabulary, and where a step is not [served](TransformerLM::serves_step).
    pub(super) fn step(&self, ids: &[usize], cache: &mut KvCache) -> Result<Vec<f32>> {
        let mut x = self.embed_step(ids, cache.len() as usize); // (B, D)
        for (block, cache) in self.blocks.iter().zip(&mut cache.layers) {
            block.step(&mut x, cache)?;
        }
        self.wte.product(&self.ln_f.step(&x))
    }

    /// Each token at this position, (B, D).
    fn embed_step(&self, ids: &[usize], position: usize) -> Vec<f32> {
        let d = self.wte.inputs();
        let (tokens, positions) = (Span::<f32>::of(&self.wte.values), Span::<f32>::of(&self.wpe));
        // SAFETY: nobody changes weights while the model is borrowed for generation; so below.
        let (tokens, positions) = unsafe { (tokens.all(), positions.all()) };
        let mut x: Vec<f32> = ids.iter().flat_map(|id| &tokens[id * d..][..d]).copied().collect();
        x.chunks_exact_mut(d).for_each(|x| add_rows(&positions[position * d..][..d], x));
        x
    }
}

impl Block {
    /// The residual stream `x` (B, D) becomes what it is after the block.
    fn step(&self, x: &mut [f32], cache: &mut LayerCache) -> Result<()> {
        add_rows(&self.attn.step(&self.ln_1.step(x), cache)?, x);
        add_rows(&self.mlp.step(&self.ln_2.step(x))?, x);
        Ok(())
    }
}

impl Attention {
    fn step(&self, x: &[f32], cache: &mut LayerCache) -> Result<Vec<f32>> {
        let qkv = self.c_attn.step(x)?; // (B, 3D)
        self.c_proj.step(&gather(&qkv, cache)?)
    }
}

impl Mlp {
    fn step(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut hidden = self.c_fc.weight.product(x)?; // (B, F)
        let bias = Span::of(&self.c_fc.bias);
        // SAFETY: as above.
        bias_gelu(&mut hidden, unsafe { bias.all() }, None);
        self.c_proj.step(&hidden)
    }
}

impl LayerNorm {
    /// Of each row.
    fn step(&self, x: &[f32]) -> Vec<f32> {
        let (weight, bias) = (Span::of(&self.weight), Span::of(&self.bias));
        // SAFETY: as above.
        let (weight, bias) = unsafe { (weight.all(), bias.all()) };
        let mut out = vec![0.0; x.len()];
        normalise(x, Norm { weight, bias, eps: LAYER_NORM_EPS as f32 }, &mut out, None);
        out
    }
}

impl Linear {
    /// (B, in) to (B, out).
    fn step(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut products = self.weight.product(x)?;
        let bias = Span::<f32>::of(&self.bias);
        // SAFETY: as above.
        let bias = unsafe { bias.all() };
        products.chunks_exact_mut(bias.len()).for_each(|product| add_rows(bias, product));
        Ok(products)
    }
}

/// What each sequence's new token gathers from those that it sees, (B, 3D) to (B, D); its own key and value join the cache.
fn gather(qkv: &[f32], cache: &mut LayerCache) -> Result<Vec<f32>> {
    let seen = cache.grow();
    let [sequences, heads, room, hs] = cache.shape();
    let (keys, values) = cache.spans(); // (B, H, room, hs)
    let d = heads * hs;
    let mut out = vec![0.0; sequences * d];
    let head = |(index, out): (usize, &mut [f32])| {
        let (sequence, head) = (index / heads, index % heads);
        let part = |which: usize| &qkv[(3 * sequence + which) * d + head * hs..][..hs];
        let first = index * room * hs;
        let (all, new) = (first..first + seen * hs, first + (seen - 1) * hs..first + seen * hs);
        // SAFETY: a head's part of the cache is used by one thread, which writes before it reads.
        let (keys, values) = unsafe {
            keys.write(new.clone()).copy_from_slice(part(1));
            values.write(new).copy_from_slice(part(2));
            (keys.read(all.clone()), values.read(all))
        };
        let scale = 1.0 / (hs as f32).sqrt();
        let query: Vec<f32> = part(0).iter().map(|value| value * scale).collect();
        let mut weights = vec![0.0; seen];
        multiply(keys, &query, hs, &mut [&mut weights]);
        causal_softmax(&mut weights, seen, seen - 1, 1.0, &mut [0.0]);
        weighted_sum(values, &weights, out);
    };
    for_each(out.chunks_exact_mut(hs).enumerate().collect(), (GRAIN / (seen * hs)).max(1), head)?;
    Ok(out)
}
