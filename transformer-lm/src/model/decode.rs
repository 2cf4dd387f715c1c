//! Generation: one token after the other, with the keys and values of those before kept.

use tch::Tensor;

use super::random::Generator;
use super::sampling::Sampling;
use super::{KvCache, TransformerLM, token_shape};
use crate::Result;

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationParams {
    /// Most tokens added to a sequence.
    pub max_new_tokens: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// A token that ends its sequence (and belongs to it).
    pub eos_token_id: Option<i64>,
    /// Where the draws come from. Row `i` of a batch has a stream of its own, so it does not depend on the other rows.
    pub seed: u64,
}

impl Default for GenerationParams {
    fn default() -> Self {
        Self { max_new_tokens: 100, sampling: Sampling::default(), eos_token_id: None, seed: 42 }
    }
}

impl TransformerLM {
    /// Continues `input_ids` (B, T) and gives both, (B, T + new). Sequences that met the end token early are filled with
    /// `pad_token_id` or else the end token; generation stops when all have.
    ///
    /// A text longer than `max_seq_len` slides: when the window is full, its later half becomes the new window's start.
    ///
    /// # Errors
    /// Ids outside the vocabulary, sampling settings that make no sense.
    pub fn generate(&self, input_ids: &Tensor, params: &GenerationParams) -> Result<Tensor> {
        let pad = self.config().pad_token_id.or(params.eos_token_id).unwrap_or(0);
        let mut columns = vec![input_ids.shallow_clone()];
        for tokens in self.stream(input_ids, params)? {
            let tokens: Vec<i64> = tokens?.into_iter().map(|token| token.unwrap_or(pad)).collect();
            columns.push(Tensor::from_slice(&tokens).view([-1, 1]).to_device(input_ids.device())); // (B, 1)
        }
        Ok(Tensor::cat(&columns, 1))
    }

    /// As [`TransformerLM::generate`], token by token.
    pub fn stream(&self, input_ids: &Tensor, params: &GenerationParams) -> Result<Generation<'_>> {
        params.sampling.validate()?;
        let (b, t) = token_shape(input_ids)?;
        let longest = self.config().max_seq_len as i64;
        let room = t.saturating_add(i64::try_from(params.max_new_tokens).unwrap_or(i64::MAX)).min(longest);
        let start = t - t.min(longest);
        let window = input_ids.narrow(1, start, t - start).to_device(self.device());
        Ok(Generation {
            model: self,
            cache: KvCache::new(self.config(), b, room, self.kind(), self.device()),
            history: Vec::<Vec<i64>>::try_from(input_ids)?,
            pending: window,
            generators: (0..b as u64).map(|row| Generator::new(params.seed, row)).collect(),
            ended: vec![false; b as usize],
            left: params.max_new_tokens,
            params: params.clone(),
        })
    }
}

/// Tokens as they are drawn; an iterator over steps. A step holds a token for each sequence, `None` for those that have
/// ended. It runs the model when the next step is asked for, so stopping early costs nothing.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a TransformerLM,
    cache: KvCache,
    /// All tokens of each sequence, for windows to come.
    history: Vec<Vec<i64>>,
    /// Tokens that the model has not seen yet, (B, T).
    pending: Tensor,
    generators: Vec<Generator>,
    ended: Vec<bool>,
    left: usize,
    params: GenerationParams,
}

impl Iterator for Generation<'_> {
    type Item = Result<Vec<Option<i64>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 || self.ended.iter().all(|&ended| ended) {
            return None;
        }
        self.left -= 1;
        let step = self.step();
        if step.is_err() {
            self.left = 0;
        }
        Some(step)
    }
}

impl Generation<'_> {
    fn step(&mut self) -> Result<Vec<Option<i64>>> {
        let logits = self.model.next_logits(&self.pending, &mut self.cache)?; // (B, vocabulary)
        let tokens = self.draw(logits)?;
        self.prepare_next();
        Ok(tokens)
    }

    fn draw(&mut self, mut logits: Vec<f32>) -> Result<Vec<Option<i64>>> {
        let width = self.model.config().vocab_size;
        let mut tokens = Vec::with_capacity(self.ended.len());
        for (row, logits) in logits.chunks_mut(width).enumerate() {
            self.params.sampling.penalise(logits, &self.history[row]);
            let drawn = i64::from(self.params.sampling.draw(logits, &mut self.generators[row])?);
            // A sequence that has ended goes on unseen, so that the batch keeps its shape.
            self.history[row].push(drawn);
            tokens.push((!self.ended[row]).then_some(drawn));
            self.ended[row] |= Some(drawn) == self.params.eos_token_id;
        }
        Ok(tokens)
    }

    /// The newest token alone, or, where the cache is full, the later half of the window.
    fn prepare_next(&mut self) {
        let full = self.cache.len() == self.model.config().max_seq_len as i64;
        let keep = if full { self.model.config().max_seq_len.div_ceil(2) } else { 1 };
        if full {
            self.cache.clear();
        }
        let tokens: Vec<i64> = self.history.iter().flat_map(|row| &row[row.len() - keep..]).copied().collect();
        let rows = self.history.len() as i64;
        self.pending = Tensor::from_slice(&tokens).view([rows, keep as i64]).to_device(self.model.device());
    }
}
