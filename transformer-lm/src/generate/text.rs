//! Prompts in, text out.

use tch::Tensor;

use super::reply::{Ending, Reply};
use crate::Result;
use crate::config::GenerationSection;
use crate::data::Tokenizer;
use crate::model::sampling::Sampling;
use crate::model::{Generation, GenerationParams, TransformerLM};

/// How text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct TextParams {
    /// Most tokens added to the prompt.
    pub max_new_tokens: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// A text ends before the first of these, which are not empty.
    pub stop: Vec<String>,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for TextParams {
    fn default() -> Self {
        Self { max_new_tokens: 100, sampling: Sampling::default(), stop: Vec::new(), seed: 42 }
    }
}

impl TextParams {
    /// The configuration's, but for the length and the seed.
    pub fn of(generation: &GenerationSection, max_new_tokens: usize, seed: u64) -> Self {
        let GenerationSection { temperature, top_k, top_p, min_p, repetition_penalty, .. } = *generation;
        let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty };
        Self { max_new_tokens, sampling, stop: generation.stop.clone(), seed }
    }
}

/// A text that a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What it added to the prompt.
    pub text: String,
    /// Tokens drawn for it.
    pub tokens: usize,
    /// Why it ended.
    pub ending: Ending,
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
    let samples = generate_samples(model, tokenizer, prompt, params, num_samples)?;
    Ok(samples.into_iter().map(|sample| format!("{prompt}{}", sample.text)).collect())
}

/// As [`generate_text`], without the prompt but with how each text came about.
///
/// # Errors
/// As [`generate_text`].
pub fn generate_samples(
    model: &TransformerLM,
    tokenizer: &Tokenizer,
    prompt: &str,
    params: &TextParams,
    num_samples: usize,
) -> Result<Vec<Sample>> {
    if num_samples == 0 {
        return Ok(Vec::new());
    }
    let mut rows: Vec<(Reply, String)> =
        (0..num_samples).map(|_| (Reply::new(tokenizer, &params.stop), String::new())).collect();
    for step in start(model, tokenizer, prompt, params, num_samples)? {
        for ((reply, text), token) in rows.iter_mut().zip(step?) {
            text.push_str(&reply.push(token));
        }
        if rows.iter().all(|(reply, _)| reply.ending.is_some()) {
            break;
        }
    }
    let sample = |(mut reply, mut text): (Reply, String)| {
        text.push_str(&reply.finish());
        Sample { text, tokens: reply.tokens, ending: reply.ending.unwrap_or(Ending::Length) }
    };
    Ok(rows.into_iter().map(sample).collect())
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
    Ok(TextStream { generation, reply: Reply::new(tokenizer, &params.stop) })
}

/// Pieces of text, in order; a piece holds whole characters and may be empty.
#[derive(Debug)]
pub struct TextStream<'a> {
    generation: Generation<'a>,
    reply: Reply<'a>,
}

impl TextStream<'_> {
    /// Tokens drawn so far.
    pub fn tokens(&self) -> usize {
        self.reply.tokens
    }

    /// Why the text ended; none while it may go on.
    pub fn ending(&self) -> Option<Ending> {
        self.reply.ending
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.reply.ending.is_some() {
            return None;
        }
        match self.generation.next() {
            Some(Ok(step)) => Some(Ok(self.reply.push(step.first().copied().flatten()))),
            Some(Err(error)) => Some(Err(error)),
            None => Some(Ok(self.reply.finish())),
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
