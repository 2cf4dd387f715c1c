//! Prompts in, text out.

use tch::Tensor;

use crate::Result;
use crate::data::{StreamDecoder, Tokenizer};
use crate::model::sampling::Sampling;
use crate::model::{Generation, GenerationParams, TransformerLM};

/// How text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct TextParams {
    /// Most tokens added to the prompt.
    pub max_new_tokens: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for TextParams {
    fn default() -> Self {
        Self { max_new_tokens: 100, sampling: Sampling::default(), seed: 42 }
    }
}

/// Continues `prompt` in `num_samples` ways, drawn side by side; each text begins with the prompt. Sample `i` does not
/// depend on how many there are.
///
/// # Errors
/// A prompt with characters that the tokenizer lacks, settings that make no sense.
pub fn generate_text(
    model: &TransformerLM,
    tokenizer: &Tokenizer,
    prompt: &str,
    params: &TextParams,
    num_samples: usize,
) -> Result<Vec<String>> {
    if num_samples == 0 {
        return Ok(Vec::new());
    }
    let mut samples: Vec<Vec<u32>> = vec![Vec::new(); num_samples];
    for step in start(model, tokenizer, prompt, params, num_samples)? {
        for (sample, token) in samples.iter_mut().zip(step?) {
            sample.extend(token.and_then(|token| shown(tokenizer, token)));
        }
    }
    Ok(samples.iter().map(|tokens| format!("{prompt}{}", tokenizer.decode(tokens))).collect())
}

/// Continues `prompt`, piece by piece as tokens are drawn. Together the pieces are what [`generate_text`] appends to the
/// prompt for its first sample.
///
/// # Errors
/// As [`generate_text`].
pub fn stream_text<'a>(
    model: &'a TransformerLM,
    tokenizer: &'a Tokenizer,
    prompt: &str,
    params: &TextParams,
) -> Result<TextStream<'a>> {
    let generation = start(model, tokenizer, prompt, params, 1)?;
    Ok(TextStream { tokenizer, generation, decoder: Some(StreamDecoder::new(tokenizer)) })
}

/// Pieces of text, in order; a piece holds whole characters and may be empty.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    generation: Generation<'a>,
    /// None after the last piece.
    decoder: Option<StreamDecoder<'a>>,
}

impl Iterator for TextStream<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        let decoder = self.decoder.as_mut()?;
        match self.generation.next() {
            Some(Ok(step)) => {
                let token = step.first().copied().flatten().and_then(|token| shown(self.tokenizer, token));
                Some(Ok(token.map_or_else(String::new, |token| decoder.push(token))))
            }
            Some(Err(error)) => Some(Err(error)),
            None => self.decoder.take().map(|decoder| Ok(decoder.finish())),
        }
    }
}

fn start<'a>(
    model: &'a TransformerLM,
    tokenizer: &Tokenizer,
    prompt: &str,
    params: &TextParams,
    rows: usize,
) -> Result<Generation<'a>> {
    let ids: Vec<i64> = prompt_tokens(tokenizer, prompt)?.into_iter().map(i64::from).collect();
    let ids = Tensor::from_slice(&ids).unsqueeze(0).repeat([rows as i64, 1]); // (rows, T)
    let params = GenerationParams {
        max_new_tokens: params.max_new_tokens,
        sampling: params.sampling.clone(),
        eos_token_id: tokenizer.end_token().map(i64::from),
        seed: params.seed,
    };
    model.stream(&ids, &params)
}

/// The prompt's tokens; for an empty one what a text starts after: the end token, else a new line, else token 0.
fn prompt_tokens(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
    if !prompt.is_empty() {
        return tokenizer.encode(prompt);
    }
    let start = tokenizer.end_token().map(|end| vec![end]);
    Ok(start.or_else(|| tokenizer.encode("\n").ok()).unwrap_or_else(|| vec![0]))
}

/// The end token is not part of the text.
fn shown(tokenizer: &Tokenizer, token: i64) -> Option<u32> {
    u32::try_from(token).ok().filter(|&token| Some(token) != tokenizer.end_token())
}
