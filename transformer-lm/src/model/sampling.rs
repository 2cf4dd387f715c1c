//! Picks the next token from logits.

use std::collections::HashSet;

use super::random::Generator;
use crate::{Error, Result};

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits: below 1 sharpens, above 1 flattens, 0 takes the likeliest token.
    pub temperature: f64,
    /// Draw among this many likeliest tokens only; 0 is all.
    pub top_k: usize,
    /// Of those, draw among the fewest likeliest tokens whose probabilities reach this sum; 1 is all.
    pub top_p: f64,
    /// Of those, only tokens with at least this share of the likeliest one's probability; 0 is all.
    pub min_p: f64,
    /// The logits of tokens that are in the text already are divided by this where they are positive and multiplied where they
    /// are negative (Keskar et al., 2019); 1 changes nothing, more makes repetition rarer.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 50, top_p: 0.9, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, ..Self::default() }
    }

    /// Refuses what makes no sense; the error names the setting.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::Config(format!("temperature = {}: expected 0 (greedy) or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Config(format!("top_p = {}: expected more than 0, at most 1 (all)", self.top_p)));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(Error::Config(format!("min_p = {}: expected at least 0 (all), at most 1", self.min_p)));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let penalty = self.repetition_penalty;
            return Err(Error::Config(format!("repetition_penalty = {penalty}: expected more than 0; 1 is none")));
        }
        Ok(())
    }

    /// Draws a token; the same logits and state of the generator give the same one.
    ///
    /// # Errors
    /// Logits that are not numbers: the model is broken.
    pub fn draw(&self, logits: &[f32], generator: &mut Generator) -> Result<u32> {
        if logits.is_empty() || logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY) {
            return Err(Error::Training("the model's logits are not finite; its weights are broken".into()));
        }
        if self.temperature == 0.0 {
            return Ok(likeliest(logits));
        }
        Ok(pick(&self.candidates(logits), generator.uniform()))
    }

    /// Makes the tokens of `history` less likely.
    pub fn penalise(&self, logits: &mut [f32], history: &[i64]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        let seen: HashSet<usize> = history.iter().filter_map(|&token| usize::try_from(token).ok()).collect();
        for token in seen {
            if let Some(logit) = logits.get_mut(token) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// The tokens that may be drawn, with weights in proportion to their probabilities.
    pub fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut tokens: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        if self.top_k > 0 && self.top_k < tokens.len() {
            tokens.select_nth_unstable_by(self.top_k - 1, likelier);
            tokens.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            tokens.sort_unstable_by(likelier);
        }
        let highest = tokens.iter().map(|token| token.1).fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| (f64::from(logit - highest) / self.temperature).exp();
        let mut weighted: Vec<(u32, f64)> = tokens.into_iter().map(|(token, logit)| (token, weight(logit))).collect();
        if self.top_p < 1.0 {
            weighted.truncate(nucleus(&weighted, self.top_p));
        }
        weighted.retain(|token| token.1 >= self.min_p); // the likeliest has a weight of 1
        weighted
    }
}

/// Higher logits first; of equal ones the lower token.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn likeliest(logits: &[f32]) -> u32 {
    (0u32..).zip(logits.iter().copied()).min_by(likelier).map_or(0, |token| token.0)
}

/// How many of the tokens, likeliest first, reach the share `top_p` of the sum.
fn nucleus(weighted: &[(u32, f64)], top_p: f64) -> usize {
    let wanted = top_p * weighted.iter().map(|token| token.1).sum::<f64>();
    let mut sum = 0.0;
    let reaches = |token: &(u32, f64)| {
        sum += token.1;
        sum >= wanted
    };
    weighted.iter().position(reaches).map_or(weighted.len(), |index| index + 1)
}

/// The token in whose part of the sum the share `uniform` in `[0, 1)` lies.
fn pick(weighted: &[(u32, f64)], uniform: f64) -> u32 {
    let mut left = uniform * weighted.iter().map(|token| token.1).sum::<f64>();
    for &(token, weight) in weighted {
        if left < weight {
            return token;
        }
        left -= weight;
    }
    weighted.iter().rev().find(|token| token.1 > 0.0).map_or(0, |token| token.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-20f32..20.0, 1..200)
    }

    proptest! {
        #[test]
        fn top_k_keeps_the_k_likeliest(logits in logits(), k in 1usize..50) {
            let kept = Sampling { temperature: 1.0, top_k: k, top_p: 1.0, ..Sampling::default() }.candidates(&logits);
            prop_assert_eq!(kept.len(), k.min(logits.len()));
            let lowest = kept.iter().map(|t| logits[t.0 as usize]).fold(f32::INFINITY, f32::min);
            let is_kept = |id: usize| kept.iter().any(|t| t.0 as usize == id);
            prop_assert!((0..logits.len()).all(|id| is_kept(id) || logits[id] <= lowest));
        }

        #[test]
        fn top_p_keeps_the_fewest_that_reach_it(logits in logits(), p in 0.01f64..1.0, t in 0.1f64..3.0) {
            let kept = Sampling { temperature: t, top_k: 0, top_p: p, ..Sampling::default() }.candidates(&logits);
            let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / t).exp()).collect();
            let total: f64 = weights.iter().sum();
            let share = |tokens: &[(u32, f64)]| tokens.iter().map(|t| weights[t.0 as usize]).sum::<f64>() / total;
            prop_assert!(share(&kept) >= p - 1e-6);
            prop_assert!(share(&kept[..kept.len() - 1]) < p + 1e-6);
        }

        #[test]
        fn min_p_keeps_those_near_the_likeliest(logits in logits(), p in 0.0f64..=1.0, t in 0.1f64..3.0) {
            let sampling = Sampling { temperature: t, top_k: 0, top_p: 1.0, min_p: p, ..Sampling::default() };
            let kept = sampling.candidates(&logits);
            let highest = logits.iter().copied().fold(f32::MIN, f32::max);
            let share = |id: usize| (f64::from(logits[id] - highest) / t).exp();
            prop_assert!(!kept.is_empty() && kept.iter().all(|token| share(token.0 as usize) >= p));
            prop_assert_eq!(kept.len(), (0..logits.len()).filter(|&id| share(id) >= p).count());
        }

        #[test]
        fn a_penalty_lowers_what_was_said_and_nothing_else(logits in logits(), penalty in 1.01f64..3.0, said in 0i64..250) {
            let mut lowered = logits.clone();
            let sampling = Sampling { repetition_penalty: penalty, ..Sampling::default() };
            sampling.penalise(&mut lowered, &[said, said, -1]);
            for (id, (before, after)) in logits.iter().zip(&lowered).enumerate() {
                let is_lowered = id as i64 == said && *before != 0.0;
                prop_assert_eq!(is_lowered, after < before);
                prop_assert_eq!(!is_lowered, after == before);
            }
        }

        #[test]
        fn a_drawn_token_is_a_candidate(logits in logits(), k in 0usize..9, p in 0.1f64..=1.0, seed: u64) {
            let sampling = Sampling { temperature: 0.7, top_k: k, top_p: p, ..Sampling::default() };
            let token = sampling.draw(&logits, &mut Generator::new(seed, 0)).unwrap();
            prop_assert!(sampling.candidates(&logits).iter().any(|t| t.0 == token));
        }

        #[test]
        fn no_temperature_takes_the_first_of_the_likeliest(logits in logits(), seed: u64) {
            let token = Sampling::greedy().draw(&logits, &mut Generator::new(seed, 0)).unwrap() as usize;
            prop_assert!(logits.iter().all(|&l| l <= logits[token]));
            prop_assert!(logits[..token].iter().all(|&l| l < logits[token]));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 1.0, 2.0, -1.0].map(|l: f32| l);
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, ..Sampling::default() };
        let mut generator = Generator::new(5, 0);
        let mut counts = [0f64; 4];
        for _ in 0..40_000 {
            counts[sampling.draw(&logits, &mut generator).unwrap() as usize] += 1.0;
        }
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            assert!((count / 40_000.0 - f64::from(logit).exp() / total).abs() < 0.01);
        }
    }

    #[test]
    fn broken_logits_are_refused() {
        for logits in [vec![], vec![0.0, f32::NAN], vec![f32::INFINITY, 0.0]] {
            assert!(Sampling::default().draw(&logits, &mut Generator::new(0, 0)).is_err());
        }
    }
}
