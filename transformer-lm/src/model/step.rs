//! A step of a generation on the CPU: one token more of each of a few sequences, in f32, without tensors in between.
//!
//! A product with few vectors takes as long as it takes to read the weights; calls of torch's functions would take as long again in small
//! models. The weights can be read as bf16, half as many bytes.
//!
//! Letters in comments: `B` sequences, `D` width, `H` heads, `hs` width of a head, `S` tokens seen.

use std::sync::Mutex;

use bytemuck::cast_slice_mut;
use half::bf16;
use hvd_torch::parallel_for;
use lm_kernels::{Weight, add, causal_softmax, gelu, layer_norm, multiply, weighted_sum};
use tch::{Device, Kind, Tensor};

use super::cache::{KvCache, LayerCache};
use super::fused::{Span, is_served};
use super::{LAYER_NORM_EPS, ModelConfig};
use crate::{Error, Result};

/// For more sequences at once torch's products are faster.
const MOST_ROWS: i64 = 4;

/// Weights of a product that are worth a thread.
const GRAIN: usize = 1 << 16;

/// A model's weights as steps read them.
#[derive(Debug)]
pub(super) struct StepWeights {
    blocks: Vec<Block>,
    ln_f: Norm,
    /// The embedding, which is also the head.
    wte: Dense,
    /// What is added at each position.
    wpe: Tensor,
    heads: usize,
}

#[derive(Debug)]
struct Block {
    ln_1: Norm,
    c_attn: Dense,
    attn_proj: Dense,
    ln_2: Norm,
    c_fc: Dense,
    mlp_proj: Dense,
}

#[derive(Debug)]
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

/// `x·Wᵀ + b`.
#[derive(Debug)]
struct Dense {
    weight: Tensor, // (out, in)
    bias: Option<Tensor>,
    /// The weight rounded to bf16, as products under bf16 autocast see it.
    narrow: Option<Vec<bf16>>,
}

impl StepWeights {
    /// Shares the parameters, which have GPT-2's names; `wpe` may be none of them.
    pub(super) fn new(config: &ModelConfig, parameters: &[(String, Tensor)], wpe: &Tensor) -> Self {
        let find =
            |name: &str| parameters.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.shallow_clone());
        let get = |name: String| find(&name).unwrap_or_else(|| panic!("a model has the parameter {name}"));
        let norm = |path: String| Norm { weight: get(format!("{path}.weight")), bias: get(format!("{path}.bias")) };
        let dense = |path: String| Dense {
            weight: get(format!("{path}.weight")),
            bias: find(&format!("{path}.bias")),
            narrow: None,
        };
        let block = |i: usize| Block {
            ln_1: norm(format!("h.{i}.ln_1")),
            c_attn: dense(format!("h.{i}.attn.c_attn")),
            attn_proj: dense(format!("h.{i}.attn.c_proj")),
            ln_2: norm(format!("h.{i}.ln_2")),
            c_fc: dense(format!("h.{i}.mlp.c_fc")),
            mlp_proj: dense(format!("h.{i}.mlp.c_proj")),
        };
        Self {
            blocks: (0..config.n_layers).map(block).collect(),
            ln_f: norm("ln_f".into()),
            wte: dense("wte".into()),
            wpe: wpe.shallow_clone(),
            heads: config.n_heads,
        }
    }

    /// Reads the weights of products rounded to bf16 from now on.
    ///
    /// # Errors
    /// A model that is not on the CPU.
    pub(super) fn narrow(&mut self) -> Result<()> {
        let blocks = self.blocks.iter_mut();
        let dense =
            blocks.flat_map(|block| [&mut block.c_attn, &mut block.attn_proj, &mut block.c_fc, &mut block.mlp_proj]);
        dense.chain([&mut self.wte]).try_for_each(Dense::narrow)
    }

    /// Whether [`StepWeights::logits`] can serve `ids` (B, T) after the tokens in `cache`.
    pub(super) fn serves(&self, ids: &Tensor, cache: &KvCache) -> bool {
        let is_step = matches!(ids.size()[..], [rows, 1] if rows <= MOST_ROWS && cache.rows() == rows);
        let has_room = !cache.is_empty() && cache.len() < cache.room().min(self.wpe.size()[0]);
        let is_f32 = is_served(&self.wte.weight) && is_served(&self.wpe);
        is_step && has_room && is_f32 && cache.layers.iter().all(LayerCache::is_served)
    }

    /// The logits after `ids`, one of each sequence in `cache`, which then holds these too: B times as many as the vocabulary has.
    ///
    /// # Panics
    /// For ids outside the vocabulary, and where it does not [serve](StepWeights::serves).
    pub(super) fn logits(&self, ids: &[usize], cache: &mut KvCache) -> Result<Vec<f32>> {
        let mut x = self.embed(ids, cache.len() as usize); // (B, D)
        for (block, cache) in self.blocks.iter().zip(&mut cache.layers) {
            let qkv = block.c_attn.product(&block.ln_1.apply(&x))?; // (B, 3D)
            add(&mut x, &block.attn_proj.product(&gather(&qkv, self.heads, ids.len(), cache)?)?);
            let hidden = block.c_fc.product(&block.ln_2.apply(&x))?; // (B, F)
            let mut active = vec![0.0; hidden.len()];
            gelu(&hidden, &mut active);
            add(&mut x, &block.mlp_proj.product(&active)?);
        }
        self.wte.product(&self.ln_f.apply(&x))
    }

    fn embed(&self, ids: &[usize], position: usize) -> Vec<f32> {
        let d = self.wte.inputs();
        let (tokens, positions) = (Span::of(&self.wte.weight), Span::of(&self.wpe));
        // SAFETY: nobody changes weights while the model is borrowed for generation; so below.
        let row = |span: &Span, at: usize| unsafe { span.read(at * d..(at + 1) * d) }.to_vec();
        let mut x: Vec<f32> = ids.iter().flat_map(|&id| row(&tokens, id)).collect();
        let position = row(&positions, position);
        x.chunks_exact_mut(d).for_each(|x| add(x, &position));
        x
    }
}

impl Norm {
    /// Of each row.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (weight, bias) = (Span::of(&self.weight), Span::of(&self.bias));
        // SAFETY: as above.
        let (weight, bias) = unsafe { (weight.read(0..self.weight.numel()), bias.read(0..self.bias.numel())) };
        let mut out = vec![0.0; x.len()];
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            layer_norm(x, weight, bias, LAYER_NORM_EPS as f32, out);
        }
        out
    }
}

impl Dense {
    fn inputs(&self) -> usize {
        self.weight.size()[1] as usize
    }

    fn narrow(&mut self) -> Result<()> {
        if self.weight.device() != Device::Cpu {
            return Err(Error::Config(
                "weights in bf16 are for the CPU\nhint: leave out --weights, or use --device cpu".into(),
            ));
        }
        let narrow = self.weight.detach().to_kind(Kind::BFloat16).contiguous();
        let mut rows = vec![bf16::ZERO; narrow.numel()];
        narrow.f_copy_data_u8(cast_slice_mut(&mut rows), narrow.numel())?;
        self.narrow = Some(rows);
        Ok(())
    }

    /// (B, in) to (B, out).
    fn product(&self, x: &[f32]) -> Result<Vec<f32>> {
        let whole = Span::of(&self.weight);
        let mut products = match &self.narrow {
            Some(rows) => product(rows, self.inputs(), x)?,
            // SAFETY: as above.
            None => product(unsafe { whole.read(0..self.weight.numel()) }, self.inputs(), x)?,
        };
        if let Some(bias) = &self.bias {
            let span = Span::of(bias);
            // SAFETY: as above.
            let bias = unsafe { span.read(0..bias.numel()) };
            products.chunks_exact_mut(bias.len()).for_each(|products| add(products, bias));
        }
        Ok(products)
    }
}

/// `x·Wᵀ`, (B, in) to (B, out): each thread takes some of the weight's rows, for all of `x`.
fn product<W: Weight>(rows: &[W], inputs: usize, x: &[f32]) -> Result<Vec<f32>> {
    let outputs = rows.len() / inputs;
    let mut products = vec![0.0; x.len() / inputs * outputs];
    let threads = (rows.len() / GRAIN).clamp(1, tch::get_num_threads().max(1) as usize);
    let share = outputs.div_ceil(threads);
    let mut shares: Vec<Vec<&mut [f32]>> = (0..outputs.div_ceil(share)).map(|_| Vec::new()).collect();
    for product in products.chunks_mut(outputs) {
        shares.iter_mut().zip(product.chunks_mut(share)).for_each(|(all, part)| all.push(part));
    }
    let parts = rows.chunks(share * inputs).zip(shares).collect();
    for_each(parts, 1, |(rows, mut products)| multiply(rows, x, inputs, &mut products))?;
    Ok(products)
}

/// What each sequence's new token gathers from those that it sees, (B, 3D) to (B, D); its own key and value join the cache.
fn gather(qkv: &[f32], heads: usize, sequences: usize, cache: &mut LayerCache) -> Result<Vec<f32>> {
    let d = qkv.len() / sequences / 3;
    let (hs, room, seen) = (d / heads, cache.room(), cache.grow());
    let (keys, values) = cache.spans(); // (B, H, room, hs)
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
        causal_softmax(&mut weights, seen, seen - 1, &mut [0.0]);
        weighted_sum(values, &weights, out);
    };
    for_each(out.chunks_exact_mut(hs).enumerate().collect(), (GRAIN / (seen * hs)).max(1), head)?;
    Ok(out)
}

/// Does something with each of `parts`, on torch's threads where there is more than `grain` of them.
fn for_each<T: Send>(parts: Vec<T>, grain: usize, body: impl Fn(T) + Sync) -> Result<()> {
    if parts.len() <= grain {
        parts.into_iter().for_each(body);
        return Ok(());
    }
    let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    let take = |index: usize| parts[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    Ok(parallel_for(parts.len(), grain, &|range| range.filter_map(take).for_each(&body))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_a_product() {
        tch::set_num_threads(3);
        let (outputs, inputs) = (500, 400);
        let rows: Vec<f32> = (0..outputs * inputs).map(|i| (i as f32).sin()).collect();
        let x: Vec<f32> = (0..2 * inputs).map(|i| (i as f32).cos()).collect();
        assert!(rows.len() / GRAIN >= 3, "enough for three threads");
        let mut alone = vec![0.0; 2 * outputs];
        let (first, second) = alone.split_at_mut(outputs);
        multiply(&rows, &x, inputs, &mut [first, second]);
        assert_eq!(product(&rows, inputs, &x).unwrap(), alone);
    }

    #[test]
    fn each_part_is_served_once_with_any_grain() {
        tch::set_num_threads(3);
        for grain in [1, 4, 100] {
            let mut counts = vec![0; 50];
            for_each(counts.iter_mut().collect(), grain, |count| *count += 1).unwrap();
            assert_eq!(counts, vec![1; 50]);
        }
    }
}
