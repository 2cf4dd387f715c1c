//! The functions of [`transformer_lm::model::fused`] against torch's in f64.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hvd_torch::Hook;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};
use transformer_lm::model::Dropout;
use transformer_lm::model::fused::{
    Dense, HeadOptions, add_linear, add_linear_norm, causal_attention, embedding, gelu, layer_norm, linear,
    linear_cross_entropy,
};

#[path = "support/plain.rs"]
mod plain;
use plain::*;

/// Runs a function of the inputs in both precisions, with the same gradient of the result, and compares results and gradients; and its
/// result where no gradient is wanted.
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
    let inputs: Vec<Tensor> = inputs.iter().map(|input| leaf(input, Kind::Float)).collect();
    let error = distance(&tch::no_grad(|| served(&inputs)), &expected[0]);
    assert!(error < tolerance, "result where no gradient is wanted: {error}");
}

fn options(smoothing: f64) -> HeadOptions {
    HeadOptions { smoothing, ignore_index: -100, count_correct: true }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gelu_is_torchs(seed in 0i64..1000, rows in 1i64..40, columns in 1i64..700, scale in 0.1f64..8.0) {
        let (x, bias) = (values(seed, &[rows, columns], scale), values(seed + 1, &[columns], 1.0));
        agrees(
            &[x, bias],
            |x| gelu(&x[0] * 1.0, Some(&x[1])).unwrap(),
            |x| (&x[0] + &x[1]).gelu("tanh"),
        );
    }

    #[test]
    fn a_branch_is_added_and_normalised(
        seed in 0i64..1000, rows in 1i64..150, inputs in 1i64..40, columns in 8i64..150, scale in 0.1f64..8.0, eps in 1e-5f64..1e-1,
    ) {
        let of = |at: i64, shape: &[i64]| values(seed + at, shape, if at == 0 { scale } else { 1.0 });
        let vector = |at| of(at, &[columns]);
        let given = [of(0, &[rows, columns]), of(1, &[rows, inputs]), of(2, &[columns, inputs]), vector(3), vector(4), vector(5)];
        let both = |(sum, normal): (Tensor, Tensor)| Tensor::cat(&[sum, normal], 0);
        agrees_within(
            1e-4, // of few columns the variance may be small beside the values
            &given,
            |x| both(add_linear_norm(&x[0], &x[1], dense(&x[2..]), norm(&x[4..], eps)).unwrap()),
            |x| {
                let sum = &x[0] + x[1].linear(&x[2], Some(&x[3]));
                both((sum.shallow_clone(), plain_norm(&sum, &x[4], &x[5], eps)))
            },
        );
        agrees_within(
            1e-4,
            &[&given[0], &given[4], &given[5]].map(Tensor::shallow_clone),
            |x| layer_norm(&x[0], norm(&x[1..], eps)).unwrap(),
            |x| plain_norm(&x[0], &x[1], &x[2], eps),
        );
        agrees_within(
            2e-5,
            &given[..4],
            |x| add_linear(&x[0], &x[1], dense(&x[2..])).unwrap(),
            |x| &x[0] + x[1].linear(&x[2], Some(&x[3])),
        );
    }

    /// The gradients of weights are there before, and what is added in place counts as one pass of each.
    #[test]
    fn gradients_in_place_are_those_of_torch(
        seed in 0i64..1000, rows in 1i64..60, width in 8i64..40, vocabulary in 2i64..300, passes in 1usize..3, held in any::<bool>(),
    ) {
        let shapes: [&[i64]; 5] = [&[vocabulary, width], &[width, width], &[width], &[width, width], &[width]];
        let weights: Vec<Tensor> = (0..).zip(shapes).map(|(at, shape)| values(seed + at, shape, 0.5)).collect();
        let ids = some_ids(seed + 9, rows, vocabulary);
        let targets = some_targets(seed, rows, vocabulary);
        prop_assume!(targets.ge(0).any().int64_value(&[]) == 1);
        let run = |kind, model: &dyn Fn(&[Tensor]) -> Tensor| {
            let weights: Vec<Tensor> = weights.iter().map(|weight| leaf(weight, kind)).collect();
            let fired: Vec<_> = weights.iter().map(|_| Arc::new(AtomicUsize::new(0))).collect();
            let count = |fired: &Arc<AtomicUsize>| {
                let fired = fired.clone();
                move || _ = fired.fetch_add(1, Ordering::Relaxed)
            };
            let hook = |(weight, fired)| Hook::after_accumulate(weight, count(fired)).unwrap();
            let _hooks: Vec<_> = weights.iter().zip(&fired).map(hook).collect();
            if held {
                weights.iter().for_each(|weight| hvd_torch::set_grad(weight, Some(&weight.ones_like())).unwrap());
            }
            for _ in 0..passes {
                (model(&weights) * 0.3).backward();
            }
            assert!(fired.iter().all(|fired| fired.load(Ordering::Relaxed) == passes), "{fired:?}");
            weights.iter().map(Tensor::grad).collect::<Vec<_>>()
        };
        let found = run(Kind::Float, &|w| {
            let x = embedding(&w[0], &ids).unwrap();
            let y = linear(&x, &w[1], Some(&w[2])).unwrap().tanh();
            let y = add_linear(&x, &y, dense(&w[3..])).unwrap();
            linear_cross_entropy(&y, &w[0], &targets, options(0.1)).unwrap().unwrap().loss
        });
        let expected = run(Kind::Double, &|w| {
            let x = Tensor::embedding(&w[0], &ids, -1, false, false);
            let y = x.linear(&w[1], Some(&w[2])).tanh();
            plain_loss(&(&x + y.linear(&w[3], Some(&w[4]))), &w[0], &targets, 0.1)
        });
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(distance(found, expected) < 2e-5, "weight {at}");
        }
    }

    #[test]
    fn attention_is_two_products_and_a_softmax(
        seed in 0i64..1000, b in 1i64..4, t in 1i64..200, heads in 1i64..4, width in 1i64..24, scale in 0.1f64..3.0,
        probability in prop_oneof![Just(0.0), 0.05..0.9f64],
    ) {
        let (qkv, dropout) = (values(seed, &[b, t, 3 * heads * width], scale), dropout(probability, b));
        agrees(
            &[qkv],
            |qkv| causal_attention(&qkv[0], heads as usize, &dropout).unwrap(),
            |qkv| plain_attention(&qkv[0], heads, &dropout),
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
    let found = causal_attention(&qkv, 2, &Dropout::none()).unwrap();
    assert!(distance(&found, &plain_attention(&qkv, 2, &Dropout::none())) < 1e-12);
    let vector = values(2, &[24], 1.0);
    let activated = (&qkv + &vector).gelu("tanh");
    assert_eq!(gelu(qkv.copy(), Some(&vector)).unwrap(), activated);
    let turned = |kind: Kind| qkv.to_kind(kind).transpose(0, 1);
    let single = vector.to_kind(Kind::Float);
    assert!(distance(&gelu(turned(Kind::Float), Some(&single)).unwrap(), &activated.transpose(0, 1)) < 1e-6);
    assert_eq!(gelu(qkv.copy(), None).unwrap(), qkv.gelu("tanh"));
    let parameters = [vector.shallow_clone(), vector.shallow_clone()];
    let square = values(3, &[24, 24], 1.0);
    let layer = Dense { weight: &square, bias: &vector };
    let (sum, normal) = add_linear_norm(&qkv, &qkv, layer, norm(&parameters, 1e-5)).unwrap();
    assert!(distance(&sum, &(&qkv + qkv.linear(&square, Some(&vector)))) < 1e-12);
    assert!(distance(&normal, &plain_norm(&sum, &vector, &vector, 1e-5)) < 1e-12);
    let targets = some_targets(1, 4, 5);
    let (hidden, weight) = (values(1, &[4, 3], 1.0), values(1, &[5, 3], 1.0));
    assert!(linear_cross_entropy(&hidden, &weight, &targets, options(0.0)).unwrap().is_none());
    let _autocast = hvd_torch::Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
    let [hidden, weight] = [hidden, weight].map(|tensor| tensor.to_kind(Kind::Float));
    assert!(linear_cross_entropy(&hidden, &weight, &targets, options(0.0)).unwrap().is_none());
}

/// The gradient of `sum(outside · y)`.
fn gradient(x: &Tensor, outside: &Tensor, y: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let x = x.detach().copy().set_requires_grad(true);
    hvd_torch::autograd::backward(&[(&y(&x), Some(outside))], false).unwrap();
    x.grad()
}

#[test]
fn attention_of_every_type_drops_the_same_weights() {
    let (qkv, dropout) = (values(1, &[2, 70, 24], 1.0), dropout(0.3, 2));
    let expected = plain_attention(&qkv, 2, &dropout);
    let outside = values(2, &expected.size(), 1.0);
    let expected_grad = gradient(&qkv, &outside, |qkv| plain_attention(qkv, 2, &dropout));
    for (kind, tolerance) in [(Kind::Double, 1e-7), (Kind::Float, 5e-6), (Kind::BFloat16, 2e-2), (Kind::Half, 2e-3)] {
        let qkv = qkv.to_kind(kind);
        let found = causal_attention(&qkv, 2, &dropout).unwrap();
        let grad = gradient(&qkv, &outside.to_kind(kind), |qkv| causal_attention(qkv, 2, &dropout).unwrap());
        assert_eq!((found.kind(), grad.kind()), (kind, kind));
        assert!(distance(&found, &expected) < tolerance, "{kind:?}: {}", distance(&found, &expected));
        assert!(distance(&grad, &expected_grad) < tolerance, "{kind:?}: {}", distance(&grad, &expected_grad));
    }
}

#[test]
fn what_is_dropped_has_no_gradient_and_what_is_kept_a_larger_one() {
    let dropout = dropout(0.25, 3);
    let factors = factors(&dropout, &[3, 50, 33]);
    let distinct = Vec::<f64>::try_from(factors.view([-1]).unique_dim(0, true, false, false).0).unwrap();
    assert!(matches!(distinct[..], [zero, kept] if zero == 0.0 && (kept - 4.0 / 3.0).abs() < 1e-7), "{distinct:?}");
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let [x, outside] = [1, 2].map(|seed| values(seed, &[3, 50, 33], 1.0).to_kind(kind));
        let grad = gradient(&x, &outside, |x| dropout.apply(x * 1.0).unwrap());
        let left = dropout.apply(x.copy()).unwrap();
        for (found, given) in [(left, x), (grad, outside)] {
            assert_eq!(found.kind(), kind);
            assert!(found.equal(&(given.to_kind(Kind::Double) * &factors).to_kind(kind)), "{kind:?}");
        }
    }
}

#[test]
fn parts_and_sequences_have_masks_of_their_own() {
    let (probability, shape) = (0.3, [2, 100, 1000]);
    let whole = dropout(probability, 2);
    let masks = [whole.clone(), whole.at(0), whole.at(1), whole.at(0).at(1), whole.at(1).at(0)];
    let masks: Vec<Tensor> =
        masks.iter().map(|dropout| factors(dropout, &shape)).flat_map(|both| [both.get(0), both.get(1)]).collect();
    let (expected, spread) = (2.0 * probability * (1.0 - probability), 0.5 / 1e5f64.sqrt());
    for (a, b) in masks.iter().enumerate().flat_map(|(at, a)| masks[..at].iter().map(move |b| (a, b))) {
        let differences = a.not_equal_tensor(b).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((differences - expected).abs() < 5.0 * spread, "{differences}, expected {expected}");
    }
    // A sequence alone has the mask that it has beside others.
    assert_eq!(factors(&Dropout::new(probability, [1001]), &[1, 100, 1000]).get(0), masks[1]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let floats = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    assert!(
        causal_attention(&floats(&[2, 5, 12]), 3, &Dropout::none())
            .unwrap_err()
            .to_string()
            .contains("D a multiple of 3")
    );
    assert!(causal_attention(&floats(&[2, 5, 13]), 2, &Dropout::none()).is_err());
    assert!(causal_attention(&floats(&[5, 12]), 2, &Dropout::none()).is_err());
    let refusal = causal_attention(&floats(&[2, 5, 12]), 2, &dropout(0.1, 3)).unwrap_err().to_string();
    assert!(refusal.contains("dropout of 3 sequences for 2"), "{refusal}");
    assert!(dropout(0.1, 3).apply(floats(&[2, 3])).is_err() && dropout(0.1, 3).apply(floats(&[3])).is_err());
    assert!(gelu(floats(&[5, 12]), Some(&floats(&[5]))).is_err());
    let add = |residual: &[i64], weight: &[i64], bias: &[i64]| {
        add_linear(&floats(residual), &floats(&[5, 3]), dense(&[floats(weight), floats(bias)])).map(drop)
    };
    assert!(add(&[5, 12], &[12, 3], &[12]).is_ok());
    assert!(add(&[5, 12], &[12, 4], &[12]).is_err() && add(&[4, 12], &[12, 3], &[12]).is_err());
    assert!(add(&[5, 1], &[12, 3], &[12]).is_err() && add(&[5, 12], &[12, 3], &[5, 12]).is_err());
    assert!(layer_norm(&floats(&[5, 12]), norm(&[floats(&[12]), floats(&[5])], 1e-5)).is_err());
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
        let zeros = x.zeros_like();
        let activated = gelu(x.copy(), Some(&zeros)).unwrap();
        assert!(activated.isfinite().logical_not().any().int64_value(&[]) == 1);
        let normal = layer_norm(&x, norm(&[x.ones_like(), zeros], 1e-5)).unwrap();
        assert!(normal.isnan().any().int64_value(&[]) == 1);
        let attended = causal_attention(&x.view([1, 4, 12]), 2, &Dropout::none()).unwrap();
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
    let y = gelu(&x * 1.0, Some(&x)).unwrap().sum(Kind::Float);
    hvd_torch::autograd::backward(&[(&y, None)], true).unwrap();
    let once = x.grad().copy();
    hvd_torch::autograd::backward(&[(&y, None)], false).unwrap();
    assert!(distance(&x.grad(), &(once * 2.0).to_kind(Kind::Double)) < 1e-6);
    assert!(hvd_torch::autograd::backward(&[(&y, None)], false).is_err());
}
