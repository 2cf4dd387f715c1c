//! The gradients of a micro-batch, with activations kept or computed twice, and the smoothed loss.

mod support;

use std::sync::{Mutex, PoisonError};

use support::{distance, ids, lively_model, tiny};
use tch::{Kind, Tensor};
use transformer_lm::model::random::Generator;
use transformer_lm::model::{Backward, LossSums, ModelConfig, TransformerLM};

const FACTOR: f64 = 0.25;
const SEED: i64 = 3;

fn batch() -> Tensor {
    ids(&[vec![1, 2, 3, 4, 5, 6, 7], vec![10, 0, 3, 3, 9, 1, 2]])
}

fn how(autocast: Option<Kind>) -> Backward {
    Backward { factor: FACTOR, accuracy: true, autocast }
}

/// Loss and gradients with the dropout of one seed. The tests' threads share torch's generator.
fn seeded_backward(model: &TransformerLM, how: &Backward) -> LossSums {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(SEED);
    model.backward(&batch(), how).unwrap()
}

/// The loss, and the gradient of each parameter.
fn gradients(config: &ModelConfig, kind: Kind, autocast: Option<Kind>) -> (f64, Vec<(String, Tensor)>) {
    let (_store, model) = lively_model(config, kind);
    let sums = seeded_backward(&model, &how(autocast));
    assert_eq!(sums.tokens, 12);
    assert!(!sums.loss.requires_grad() && sums.correct.is_some());
    (sums.loss.double_value(&[]), model.parameters().into_iter().map(|(name, p)| (name, p.grad())).collect())
}

#[test]
fn recomputed_gradients_have_the_same_bits() {
    for (autocast, dropout) in [(None, 0.0), (None, 0.3), (Some(Kind::BFloat16), 0.0), (Some(Kind::BFloat16), 0.3)] {
        let config = ModelConfig { dropout, ..tiny() };
        let (loss, kept) = gradients(&config, Kind::Float, autocast);
        let config = ModelConfig { gradient_checkpointing: true, ..config };
        let (same_loss, recomputed) = gradients(&config, Kind::Float, autocast);
        assert_eq!(loss, same_loss);
        for ((name, kept), (_, recomputed)) in kept.iter().zip(&recomputed) {
            assert!(kept.equal(recomputed) && kept.abs().max().double_value(&[]) > 0.0, "{name}");
        }
    }
}

#[test]
fn gradients_add_up_over_micro_batches() {
    for gradient_checkpointing in [false, true] {
        let config = ModelConfig { gradient_checkpointing, ..tiny() };
        let (_, once) = gradients(&config, Kind::Double, None);
        let (_store, model) = lively_model(&config, Kind::Double);
        (0..2).for_each(|_| drop(model.backward(&batch(), &how(None)).unwrap()));
        for ((name, once), (_, parameter)) in once.iter().zip(model.parameters()) {
            assert!(distance(&(once * 2.0), &parameter.grad()) < 1e-12, "{name}");
        }
    }
}

/// The loss with the weights moved along `direction`, with the dropout of one seed.
fn loss_along(model: &TransformerLM, direction: &[Tensor], step: f64) -> f64 {
    let shift = |by: f64| {
        for ((_, mut parameter), direction) in model.parameters().into_iter().zip(direction) {
            tch::no_grad(|| parameter += direction * by);
        }
    };
    shift(step);
    let loss = seeded_backward(model, &how(None)).loss.double_value(&[]);
    shift(-step);
    loss
}

/// Where the backward pass had other masks than the forward pass, its gradients would not be those of the loss.
#[test]
fn gradients_with_dropout_agree_with_finite_differences() {
    let config = ModelConfig { dropout: 0.3, ..tiny() };
    let (_, gradients) = gradients(&config, Kind::Double, None);
    let (_store, model) = lively_model(&config, Kind::Double);
    let mut generator = Generator::new(9, 0);
    let direction: Vec<Tensor> = gradients
        .iter()
        .map(|(_, gradient)| {
            let noise: Vec<f64> = (0..gradient.numel()).map(|_| generator.normal_pair().0).collect();
            Tensor::from_slice(&noise).view(&gradient.size()[..])
        })
        .collect();
    let expected: f64 =
        gradients.iter().zip(&direction).map(|((_, g), d)| (g * d).sum(Kind::Double).double_value(&[])).sum();
    let slope = (loss_along(&model, &direction, 1e-6) - loss_along(&model, &direction, -1e-6)) / 2e-6 * FACTOR;
    assert!((slope - expected).abs() < 1e-5 * expected.abs(), "{slope} {expected}");
    assert_ne!(loss_along(&model, &direction, 0.0), {
        let (_store, model) = lively_model(&ModelConfig { dropout: 0.0, ..config }, Kind::Double);
        loss_along(&model, &direction, 0.0)
    });
}

#[test]
fn a_smoothed_loss_is_the_mixture_of_the_papers_and_only_in_training() {
    let smoothing = 0.1;
    let (_store, plain) = lively_model(&tiny(), Kind::Double);
    let (_store, smooth) = lively_model(&ModelConfig { label_smoothing: smoothing, ..tiny() }, Kind::Double);
    let batch = batch();
    let loss = |model: &TransformerLM, train| model.batch_loss(&batch, train, false).unwrap().loss.double_value(&[]);
    assert_eq!(loss(&plain, true), loss(&smooth, false));
    let log_p = plain.logits(&plain.hidden(&batch.narrow(1, 0, 6), None, false).unwrap()).log_softmax(-1, Kind::Double);
    let uniform = -log_p.mean_dim(-1, false, Kind::Double).sum(Kind::Double).double_value(&[]);
    let expected = (1.0 - smoothing) * loss(&plain, true) + smoothing * uniform;
    assert!((loss(&smooth, true) - expected).abs() < 1e-9, "{} {expected}", loss(&smooth, true));
}
