//! Generation with the cache against generation without.

mod support;

use lm_kernels::QUANTUM;
use support::{distance, ids, lively_model, tiny};
use tch::nn::VarStore;
use tch::{Kind, Tensor};
use transformer_lm::model::sampling::Sampling;
use transformer_lm::model::{GenerationParams, KvCache, ModelConfig, Positions, StepWeights, TransformerLM};

fn config() -> ModelConfig {
    ModelConfig { max_seq_len: 16, ..tiny() }
}

fn greedy(max_new_tokens: usize) -> GenerationParams {
    GenerationParams { max_new_tokens, sampling: Sampling::greedy(), ..GenerationParams::default() }
}

fn rows(tokens: &Tensor) -> Vec<Vec<i64>> {
    Vec::<Vec<i64>>::try_from(tokens).unwrap()
}

/// Runs the whole window through the model for every token; the window slides as `generate` documents.
fn greedy_without_cache(model: &TransformerLM, start: &[usize], new: usize) -> Vec<i64> {
    let longest = model.config().max_seq_len;
    let mut tokens: Vec<i64> = start.iter().map(|&id| id as i64).collect();
    let mut from = tokens.len().saturating_sub(longest);
    for _ in 0..new {
        if tokens.len() - from > longest {
            from = tokens.len() - longest.div_ceil(2);
        }
        let (logits, _) =
            model.forward_t(&Tensor::from_slice(&tokens[from..]).unsqueeze(0), None, None, false).unwrap();
        tokens.push(logits.get(0).get(-1).argmax(0, false).int64_value(&[]));
    }
    tokens
}

#[test]
fn the_cache_changes_nothing() {
    let (_store, model) = lively_model(&config(), Kind::Double);
    let starts = [vec![3, 1, 4], vec![10, 0, 2]];
    let generated = rows(&model.generate(&ids(&starts), &greedy(13)).unwrap());
    for (start, generated) in starts.iter().zip(generated) {
        assert_eq!(generated, greedy_without_cache(&model, start, 13));
    }
}

#[test]
fn a_text_longer_than_the_window_slides() {
    let (_store, model) = lively_model(&config(), Kind::Double);
    for start in [vec![3, 1, 4], vec![5; 16], (0..40).map(|i| i % 11).collect()] {
        let generated = rows(&model.generate(&ids(std::slice::from_ref(&start)), &greedy(40)).unwrap());
        assert_eq!(generated[0], greedy_without_cache(&model, &start, 40));
    }
}

#[test]
fn the_cache_takes_several_tokens_at_once() {
    let (_store, model) = lively_model(&config(), Kind::Double);
    let tokens = ids(&[vec![1, 2, 3, 4, 5, 6, 7], vec![9, 8, 7, 6, 5, 4, 3]]);
    let whole = model.hidden(&tokens, None, false).unwrap();
    let mut cache = KvCache::new(&config(), 2, 7, Kind::Double, model.device());
    let mut parts = Vec::new();
    for (start, len) in [(0, 2), (2, 1), (3, 3), (6, 1)] {
        parts.push(model.hidden_cached(&tokens.narrow(1, start, len), &mut cache).unwrap());
    }
    assert!(support::distance(&whole, &Tensor::cat(&parts, 1)) < 1e-12);
    assert_eq!(cache.len(), 7);
    assert!(model.hidden_cached(&tokens.narrow(1, 0, 1), &mut cache).is_err());
}

#[test]
fn a_sequence_does_not_depend_on_its_neighbours() {
    let (_store, model) = lively_model(&config(), Kind::Double);
    let params = GenerationParams { max_new_tokens: 20, seed: 9, ..GenerationParams::default() };
    let (first, second) = (vec![3, 1, 4], vec![10, 0, 2]);
    let both = rows(&model.generate(&ids(&[first.clone(), second]), &params).unwrap());
    let alone = rows(&model.generate(&ids(std::slice::from_ref(&first)), &params).unwrap());
    assert_eq!(both[0], alone[0]);
    tch::manual_seed(12345);
    assert_eq!(alone, rows(&model.generate(&ids(std::slice::from_ref(&first)), &params).unwrap()));
    let other = GenerationParams { seed: 10, ..params };
    assert_ne!(alone, rows(&model.generate(&ids(&[first]), &other).unwrap()));
}

#[test]
fn the_end_token_ends_a_sequence() {
    let (_store, model) = lively_model(&config(), Kind::Double);
    let start = [vec![3, 1, 4], vec![10, 0, 2]];
    let free = rows(&model.generate(&ids(&start), &greedy(12)).unwrap());
    let end = free[0][6];
    let params = GenerationParams { eos_token_id: Some(end), ..greedy(12) };
    let ended = rows(&model.generate(&ids(&start), &params).unwrap());
    for (free, ended) in free.iter().zip(&ended) {
        let stop = free[3..].iter().position(|&token| token == end).map_or(free.len(), |at| at + 4);
        assert_eq!(ended[..stop.min(ended.len())], free[..stop.min(ended.len())]);
        assert!(ended[stop.min(ended.len())..].iter().all(|&token| token == 7));
    }
}

#[test]
fn nothing_new_is_nothing_new() {
    let (_store, model) = lively_model(&config(), Kind::Float);
    let start = ids(&[vec![1, 2]]);
    assert_eq!(model.generate(&start, &greedy(0)).unwrap(), start);
    let mut params = greedy(1);
    params.sampling.temperature = -1.0;
    assert!(model.generate(&start, &params).is_err());
    assert!(model.generate(&ids(&[vec![11]]), &greedy(1)).is_err());
}

fn some_tokens(sequences: usize) -> Tensor {
    ids(&(0..sequences).map(|row| vec![1 + row, 4, 9, row, 3, 10 - row]).collect::<Vec<_>>())
}

/// Logits of the last of some steps after a prompt of two tokens.
fn step(model: &TransformerLM, sequences: usize) -> Tensor {
    let tokens = some_tokens(sequences);
    let mut cache = KvCache::new(model.config(), sequences as i64, 6, model.kind(), model.device());
    let mut logits = model.next_logits(&tokens.narrow(1, 0, 2), &mut cache).unwrap();
    for at in 2..6 {
        logits = model.next_logits(&tokens.narrow(1, at, 1), &mut cache).unwrap();
    }
    Tensor::from_slice(&logits).view([sequences as i64, -1])
}

#[test]
fn steps_compute_what_the_whole_window_does() {
    for positions in [Positions::Learned, Positions::Sinusoidal] {
        for (sequences, threads) in [(1, 1), (1, 2), (3, 1), (3, 2), (7, 1)] {
            let (_store, model) = lively_model(&ModelConfig { positions, ..config() }, Kind::Float);
            tch::set_num_threads(threads);
            let (logits, _) = model.forward_t(&some_tokens(sequences), None, None, false).unwrap();
            let difference = distance(&logits.select(1, 5), &step(&model, sequences));
            assert!(difference < 1e-5, "{positions:?}, {sequences} sequences, {threads} threads: {difference}");
        }
    }
}

#[test]
fn a_step_refuses_what_does_not_fit() {
    let (_store, model) = lively_model(&config(), Kind::Float);
    let mut cache = KvCache::new(model.config(), 1, 4, model.kind(), model.device());
    let mut logits = |tokens: Vec<usize>| model.next_logits(&ids(&[tokens]), &mut cache);
    assert_eq!(logits(vec![1, 2]).unwrap().len(), 11);
    assert!(logits(vec![11]).unwrap_err().to_string().contains("token ids from 11 to 11"));
    assert_eq!(logits(vec![3]).unwrap().len(), 11);
    assert_eq!(logits(vec![4]).unwrap().len(), 11);
    assert!(logits(vec![5]).unwrap_err().to_string().contains("do not fit into a cache of 4"));
}

/// What a matrix is after it was rounded, as [`StepWeights`] say.
fn rounded(matrix: &Tensor, weights: StepWeights) -> Tensor {
    match weights {
        StepWeights::Bf16 => matrix.to_kind(Kind::BFloat16),
        StepWeights::Int8 => {
            let parts: Vec<Tensor> = matrix.split(QUANTUM as i64, 1);
            let round = |part: &Tensor| {
                let scale = part.abs().amax([1], true) / 127.0;
                (part / &scale).round() * scale
            };
            Tensor::cat(&parts.iter().map(round).collect::<Vec<_>>(), 1)
        }
    }
}

/// A model whose matrices, all but one, hold rounded numbers.
fn rounded_but(left: &str, weights: StepWeights) -> (VarStore, TransformerLM) {
    let (store, model) = lively_model(&config(), Kind::Float);
    let parameters = model.parameters().into_iter();
    for (_, mut parameter) in parameters.filter(|(name, parameter)| parameter.dim() == 2 && name != left) {
        tch::no_grad(|| parameter.copy_(&rounded(&parameter, weights)));
    }
    (store, model)
}

/// How far narrow weights move the logits of [`step`].
fn narrowing((_store, mut model): (VarStore, TransformerLM), weights: StepWeights, sequences: usize) -> f64 {
    let whole = step(&model, sequences);
    model.narrow_weights(weights).unwrap();
    distance(&whole, &step(&model, sequences))
}

const BOTH: [StepWeights; 2] = [StepWeights::Bf16, StepWeights::Int8];

#[test]
fn narrow_weights_are_the_weights_rounded() {
    for (weights, sequences) in BOTH.into_iter().flat_map(|weights| [1, 3, 7].map(|sequences| (weights, sequences))) {
        let difference = narrowing(lively_model(&config(), Kind::Float), weights, sequences);
        // Seven sequences at once are worth the whole weights.
        assert_eq!(difference == 0.0, sequences == 7, "{weights:?}: {difference}");
        assert!(difference < 0.1, "{weights:?}: {difference}");
        let difference = narrowing(rounded_but("nothing", weights), weights, sequences);
        assert!(difference < 1e-5, "{weights:?}: {difference}");
    }
}

#[test]
fn every_weight_of_a_product_is_narrow() {
    let (_store, model) = lively_model(&config(), Kind::Float);
    let matrices = model.parameters().into_iter().filter(|(_, parameter)| parameter.dim() == 2);
    // Positions are only added.
    for (name, _) in matrices.filter(|(name, _)| name != "wpe.weight") {
        for weights in BOTH {
            assert!(narrowing(rounded_but(&name, weights), weights, 1) > 1e-5, "{name} {weights:?}");
        }
    }
}
