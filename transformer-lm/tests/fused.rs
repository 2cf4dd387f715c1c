//! The functions of [`transformer_lm::model::fused`] against torch's in f64.

use proptest::prelude::*;
use tch::{Device, Kind, Reduction, Tensor};
use transformer_lm::model::fused::{HeadOptions, causal_attention, gelu, linear_cross_entropy};

/// Values from `seed`, so that a failing case can be run again.
fn values(seed: i64, shape: &[i64], scale: f64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(shape, (Kind::Double, Device::Cpu)) * scale
}

/// The greatest difference, relative to the greatest value expected.
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    let size = expected.abs().max().double_value(&[]).max(1e-30);
    (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]) / size
}

fn leaf(tensor: &Tensor, kind: Kind) -> Tensor {
    tensor.to_kind(kind).detach().copy().set_requires_grad(true)
}

/// Runs `function` of the inputs in both precisions, with the same gradient of the result, and compares results and gradients.
fn agrees(inputs: &[Tensor], served: impl Fn(&[Tensor]) -> Tensor, plain: impl Fn(&[Tensor]) -> Tensor) {
    agrees_within(5e-6, inputs, served, plain);
}

fn agrees_within(
    tolerance: f64,
    inputs: &[Tensor],
    served: impl Fn(&[Tensor]) -> Tensor,
    plain: impl Fn(&[Tensor]) -> Tensor,
) {
    let run = |kind, function: &dyn Fn(&[Tensor]) -> Tensor| {
        let inputs: Vec<Tensor> = inputs.iter().map(|input| leaf(input, kind)).collect();
        let result = function(&inputs);
        let outside = values(99, &result.size(), 1.0).to_kind(kind);
        hvd_torch::autograd::backward(&[(&result, Some(&outside))], false).unwrap();
        let mut all = vec![result.detach()];
        all.extend(inputs.iter().map(Tensor::grad));
        all
    };
    let (found, expected) = (run(Kind::Float, &served), run(Kind::Double, &plain));
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!((found.kind(), found.size()), (Kind::Float, expected.size()));
        let error = distance(found, expected);
        assert!(error < tolerance, "result (0) or gradient of input {at}: {error}");
    }
}

/// Queries, keys and values beside each other, by plain products and a softmax.
fn plain_attention(qkv: &Tensor, heads: i64) -> Tensor {
    let (b, t, d) = (qkv.size()[0], qkv.size()[1], qkv.size()[2] / 3);
    let part = |at: i64| qkv.narrow(2, at * d, d).reshape([b, t, heads, d / heads]).transpose(1, 2); // (B, H, T, hs)
    let scores = part(0).matmul(&part(1).transpose(2, 3)) / ((d / heads) as f64).sqrt();
    let hidden = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).tril(0).logical_not();
    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double);
    weights.matmul(&part(2)).transpose(1, 2).reshape([b, t, d])
}

fn plain_loss(hidden: &Tensor, weight: &Tensor, targets: &Tensor, smoothing: f64) -> Tensor {
    hidden.linear::<Tensor>(weight, None).cross_entropy_loss::<Tensor>(targets, None, Reduction::Sum, -100, smoothing)
}

fn options(smoothing: f64) -> HeadOptions {
    HeadOptions { smoothing, ignore_index: -100, count_correct: true }
}

/// Targets in the vocabulary; about a fourth left out.
fn some_targets(seed: i64, rows: i64, vocabulary: i64) -> Tensor {
    tch::manual_seed(seed);
    let drawn = Tensor::randint(vocabulary, [rows], (Kind::Int64, Device::Cpu));
    drawn.masked_fill(&Tensor::rand([rows], (Kind::Float, Device::Cpu)).lt(0.25), -100)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gelu_is_torchs(seed in 0i64..1000, rows in 1i64..40, columns in 1i64..700, scale in 0.1f64..8.0) {
        let x = values(seed, &[rows, columns], scale);
        agrees(&[x], |x| gelu(&x[0]).unwrap(), |x| x[0].gelu("tanh"));
    }

    #[test]
    fn attention_is_two_products_and_a_softmax(
        seed in 0i64..1000, b in 1i64..4, t in 1i64..200, heads in 1i64..4, width in 1i64..24, scale in 0.1f64..3.0,
    ) {
        let qkv = values(seed, &[b, t, 3 * heads * width], scale);
        agrees(
            &[qkv],
            |qkv| causal_attention(&qkv[0], heads as usize).unwrap(),
            |qkv| plain_attention(&qkv[0], heads),
        );
    }

    #[test]
    fn a_head_gives_the_loss_of_its_logits(
        seed in 0i64..1000, rows in 1i64..60, width in 1i64..30, vocabulary in 2i64..3000, smoothing in 0.0f64..0.5,
    ) {
        let (hidden, weight) = (values(seed, &[rows, width], 1.0), values(seed + 1, &[vocabulary, width], 0.5));
        let targets = some_targets(seed, rows, vocabulary);
        prop_assume!(targets.ge(0).any().int64_value(&[]) == 1);
        agrees(
            &[hidden, weight],
            |x| linear_cross_entropy(&x[0], &x[1], &targets, options(smoothing)).unwrap().unwrap().loss,
            |x| plain_loss(&x[0], &x[1], &targets, smoothing),
        );
    }
}

/// So many logits that they are computed in pieces.
#[test]
fn a_head_in_pieces_gives_the_same() {
    let (rows, vocabulary) = (150, 250_000);
    let (hidden, weight) = (values(3, &[rows, 3], 1.0), values(4, &[vocabulary, 3], 0.5));
    let targets = some_targets(5, rows, vocabulary);
    agrees_within(
        1e-4, // a gradient of the hidden states is a sum over 250 000 columns
        &[hidden.shallow_clone(), weight.shallow_clone()],
        |x| linear_cross_entropy(&x[0], &x[1], &targets, options(0.1)).unwrap().unwrap().loss,
        |x| plain_loss(&x[0], &x[1], &targets, 0.1),
    );
    let [hidden, weight] = [hidden, weight].map(|tensor| tensor.to_kind(Kind::Float));
    let counted = linear_cross_entropy(&hidden, &weight, &targets, options(0.0)).unwrap().unwrap();
    let likeliest = hidden.linear::<Tensor>(&weight, None).argmax(1, false);
    assert_eq!(counted.correct, Some(likeliest.eq_tensor(&targets).sum(Kind::Int64).int64_value(&[])));
    assert!(!counted.loss.requires_grad());
}

#[test]
fn what_is_not_served_is_left_to_torch() {
    let qkv = values(1, &[2, 9, 24], 1.0);
    let found = causal_attention(&qkv, 2).unwrap();
    assert!(distance(&found, &plain_attention(&qkv, 2)) < 1e-12);
    assert_eq!(gelu(&qkv).unwrap(), qkv.gelu("tanh"));
    let turned = qkv.to_kind(Kind::Float).transpose(0, 1);
    assert!(distance(&gelu(&turned).unwrap(), &qkv.transpose(0, 1).gelu("tanh")) < 1e-6);
    let targets = some_targets(1, 4, 5);
    let (hidden, weight) = (values(1, &[4, 3], 1.0), values(1, &[5, 3], 1.0));
    assert!(linear_cross_entropy(&hidden, &weight, &targets, options(0.0)).unwrap().is_none());
    let _autocast = hvd_torch::Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
    let [hidden, weight] = [hidden, weight].map(|tensor| tensor.to_kind(Kind::Float));
    assert!(linear_cross_entropy(&hidden, &weight, &targets, options(0.0)).unwrap().is_none());
}

#[test]
fn what_does_not_fit_is_an_error() {
    let floats = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    assert!(causal_attention(&floats(&[2, 5, 12]), 3).unwrap_err().to_string().contains("D a multiple of 3"));
    assert!(causal_attention(&floats(&[2, 5, 13]), 2).is_err());
    assert!(causal_attention(&floats(&[5, 12]), 2).is_err());
    let head = |targets: &[i64]| {
        linear_cross_entropy(&floats(&[2, 3]), &floats(&[5, 3]), &Tensor::from_slice(targets), options(0.0))
    };
    assert!(head(&[0, 4]).is_ok());
    assert!(head(&[0, 5]).unwrap_err().to_string().contains("the target 5 is not in a vocabulary of 5"));
    assert!(head(&[-1, 0]).is_err() && head(&[0]).is_err());
}

#[test]
fn what_is_no_number_stays_none() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut row = vec![0.5f32; 48];
        row[7] = bad;
        let x = Tensor::from_slice(&row);
        assert!(gelu(&x).unwrap().isfinite().logical_not().any().int64_value(&[]) == 1);
        let attended = causal_attention(&x.view([1, 4, 12]), 2).unwrap();
        assert!(attended.isnan().any().int64_value(&[]) == 1);
        let weight = Tensor::ones([4, 12], (Kind::Float, Device::Cpu));
        let targets = Tensor::zeros([4], (Kind::Int64, Device::Cpu));
        let loss = linear_cross_entropy(&x.view([4, 12]), &weight, &targets, options(0.0)).unwrap().unwrap().loss;
        assert!(!loss.double_value(&[]).is_finite());
    }
}

#[test]
fn a_graph_serves_one_backward_pass_unless_it_is_retained() {
    let x = Tensor::ones([8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let y = gelu(&x).unwrap().sum(Kind::Float);
    hvd_torch::autograd::backward(&[(&y, None)], true).unwrap();
    let once = x.grad().copy();
    hvd_torch::autograd::backward(&[(&y, None)], false).unwrap();
    assert!(distance(&x.grad(), &(once * 2.0).to_kind(Kind::Double)) < 1e-6);
    assert!(hvd_torch::autograd::backward(&[(&y, None)], false).is_err());
}
