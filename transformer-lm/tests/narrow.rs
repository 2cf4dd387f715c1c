//! The functions of [`transformer_lm::model::fused`] under autocast to bf16, against torch's in f64.

use std::cell::Cell;

use hvd_torch::{Autocast, autograd};
use lm_kernels::Unit;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};
use transformer_lm::model::fused::{
    HeadOptions, add_linear, add_linear_norm, add_mlp, add_mlp_norm, causal_attention, embedding, layer_norm, linear,
    linear_cross_entropy, linear_gelu,
};

#[path = "support/plain.rs"]
mod plain;
#[path = "../../tests/src/skipped.rs"]
mod skipped;
use plain::*;

/// The greatest difference that rounding to bf16 (8 bits of precision) a few times may make, relative to the greatest value.
const TOLERANCE: f64 = 0.03;

/// Whether this processor has such functions; where it has not, each test says so once.
fn is_served() -> bool {
    thread_local!(static SAID: Cell<bool> = const { Cell::new(false) });
    if Unit::best().is_none() && !SAID.replace(true) {
        skipped::skipped("this processor has no products of bf16");
    }
    Unit::best().is_some()
}

/// The results of a function and the gradients of its inputs, given those of its results.
fn results(inputs: &[Tensor], kind: Kind, function: impl Fn(&[Tensor]) -> Vec<Tensor>) -> Vec<Tensor> {
    let inputs: Vec<Tensor> = inputs.iter().map(|input| leaf(input, kind)).collect();
    let results = function(&inputs);
    let outside: Vec<Tensor> = (0i64..)
        .zip(&results)
        .map(|(at, result)| values(90 + at, &result.size(), 1.0).to_kind(Kind::BFloat16).to_kind(result.kind()))
        .collect();
    let roots: Vec<_> = results.iter().zip(&outside).map(|(result, outside)| (result, Some(outside))).collect();
    autograd::backward(&roots, false).unwrap();
    results.iter().map(Tensor::detach).chain(inputs.iter().map(Tensor::grad)).collect()
}

/// Compares results and gradients with those of the plain function in f64, and the results where no gradient is wanted with the same bits.
/// The first of the inputs that go into products (`narrow`) are rounded to bf16 before.
fn agrees(
    inputs: &[Tensor],
    narrow: impl Fn(usize) -> bool,
    served: impl Fn(&[Tensor]) -> Vec<Tensor>,
    plain: impl Fn(&[Tensor]) -> Vec<Tensor>,
) {
    let given = |inputs: &[Tensor]| -> Vec<Tensor> {
        let rounded =
            |(at, input): (usize, &Tensor)| if narrow(at) { input.to_kind(Kind::BFloat16) } else { input * 1.0 };
        inputs.iter().enumerate().map(rounded).collect()
    };
    let under_autocast = |inputs: &[Tensor]| {
        let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
        served(&given(inputs))
    };
    let found = results(inputs, Kind::Float, under_autocast);
    let expected = results(inputs, Kind::Double, plain);
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(found.size(), expected.size());
        let error = distance(found, expected);
        assert!(error < TOLERANCE, "result or gradient {at}: {error}");
    }
    let inputs: Vec<Tensor> = inputs.iter().map(|input| leaf(input, Kind::Float)).collect();
    let again = tch::no_grad(|| under_autocast(&inputs));
    assert!(again.iter().zip(&found).all(|(again, found)| again.equal(found)), "another result without gradients");
}

fn options() -> HeadOptions {
    HeadOptions { smoothing: 0.1, ignore_index: -100, count_correct: true }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn layers_are_torchs(
        seed in 0i64..1000, b in 1i64..4, t in 1i64..180, inputs in 1i64..150, outputs in 1i64..200,
    ) {
        if !is_served() {
            return Ok(());
        }
        let of = |at: i64, shape: &[i64], scale| values(seed + at, shape, scale);
        let share = 1.0 / (inputs as f64).sqrt();
        let given = [of(0, &[b, t, inputs], 1.0), of(1, &[outputs, inputs], share), of(2, &[outputs], 1.0), of(3, &[b, t, outputs], 1.0)];
        agrees(&given[..3], |at| at == 0, |x| {
            let y = linear(&x[0], &x[1], Some(&x[2])).unwrap();
            assert_eq!(y.kind(), Kind::BFloat16);
            vec![y]
        }, |x| vec![x[0].linear(&x[1], Some(&x[2]))]);
        agrees(&given[..3], |at| at == 0, |x| vec![linear_gelu(&x[0], dense(&x[1..])).unwrap()],
            |x| vec![x[0].linear(&x[1], Some(&x[2])).gelu("tanh")]);
        agrees(&given, |at| at == 0, |x| {
            let sum = add_linear(&x[3], &x[0], dense(&x[1..])).unwrap();
            assert_eq!(sum.kind(), Kind::Float);
            vec![sum]
        }, |x| vec![&x[3] + x[0].linear(&x[1], Some(&x[2]))]);
    }

    #[test]
    fn a_feed_forward_part_is_two_layers(
        seed in 0i64..1000, rows in 1i64..150, width in 16i64..100, inner in 8i64..150, eps in 1e-3f64..1e-1,
    ) {
        if !is_served() {
            return Ok(());
        }
        let of = |at: i64, shape: &[i64], scale| values(seed + at, shape, scale);
        let share = |inputs: i64| 1.0 / (inputs as f64).sqrt();
        let given = [
            of(0, &[rows, width], 1.0), of(1, &[rows, width], 1.0),
            of(2, &[inner, width], share(width)), of(3, &[inner], 1.0),
            of(4, &[width, inner], share(inner)), of(5, &[width], 1.0),
            of(6, &[width], 1.0), of(7, &[width], 1.0),
        ];
        let sum = |x: &[Tensor]| &x[0] + x[1].linear(&x[2], Some(&x[3])).gelu("tanh").linear(&x[4], Some(&x[5]));
        let layers = |x: &[Tensor]| add_mlp(&x[0], &x[1], [dense(&x[2..]), dense(&x[4..])]).unwrap();
        agrees(&given[..6], |at| at == 1, |x| vec![layers(x)], |x| vec![sum(x)]);
        agrees(&given, |at| at == 1, |x| {
            let (sum, normal) = add_mlp_norm(&x[0], &x[1], [dense(&x[2..]), dense(&x[4..])], norm(&x[6..], eps)).unwrap();
            assert!(sum.equal(&layers(x)), "another sum");
            assert_eq!((sum.kind(), normal.kind()), (Kind::Float, Kind::BFloat16));
            vec![sum, normal]
        }, |x| vec![sum(x), plain_norm(&sum(x), &x[6], &x[7], eps)]);
    }

    #[test]
    fn a_branch_is_added_and_normalised(
        seed in 0i64..1000, rows in 1i64..300, inputs in 1i64..80, columns in 16i64..150, eps in 1e-3f64..1e-1,
    ) {
        if !is_served() {
            return Ok(());
        }
        let of = |at: i64, shape: &[i64], scale| values(seed + at, shape, scale);
        let weight = of(2, &[columns, inputs], 1.0 / (inputs as f64).sqrt());
        let vector = |at| of(at, &[columns], 1.0);
        let given = [of(0, &[rows, columns], 1.0), of(1, &[rows, inputs], 1.0), weight, vector(3), vector(4), vector(5)];
        agrees(&given, |at| at == 1, |x| {
            let (sum, normal) = add_linear_norm(&x[0], &x[1], dense(&x[2..]), norm(&x[4..], eps)).unwrap();
            vec![sum, normal]
        }, |x| {
            let sum = &x[0] + x[1].linear(&x[2], Some(&x[3]));
            vec![sum.shallow_clone(), plain_norm(&sum, &x[4], &x[5], eps)]
        });
        let single = [0, 4, 5].map(|at| given[at].shallow_clone());
        agrees(&single, |_| false, |x| vec![layer_norm(&x[0], norm(&x[1..], eps)).unwrap()],
            |x| vec![plain_norm(&x[0], &x[1], &x[2], eps)]);
    }

    #[test]
    fn attention_is_two_products_and_a_softmax(
        seed in 0i64..1000, b in 1i64..4, t in 1i64..300, heads in 1i64..4, half in 1i64..70, scale in 0.1f64..2.0,
        probability in prop_oneof![Just(0.0), 0.05..0.6f64],
    ) {
        if !is_served() {
            return Ok(());
        }
        let (qkv, dropout) = (values(seed, &[b, t, 3 * heads * 2 * half], scale), dropout(probability, b));
        agrees(&[qkv], |_| true, |qkv| {
            let y = causal_attention(&qkv[0], heads as usize, &dropout).unwrap();
            assert_eq!(y.kind(), Kind::BFloat16);
            vec![y]
        }, |qkv| vec![plain_attention(&qkv[0].to_kind(Kind::BFloat16).to_kind(Kind::Double), heads, &dropout)]);
    }

    #[test]
    fn a_head_gives_the_loss_of_its_logits(
        seed in 0i64..1000, rows in 1i64..150, width in 1i64..100, vocabulary in 2i64..3000,
    ) {
        if !is_served() {
            return Ok(());
        }
        let hidden = values(seed, &[rows, width], 1.0);
        let weight = values(seed + 1, &[vocabulary, width], 1.0 / (width as f64).sqrt());
        let targets = some_targets(seed, rows, vocabulary);
        prop_assume!(targets.ge(0).any().int64_value(&[]) == 1);
        let loss = |x: &[Tensor]| linear_cross_entropy(&x[0], &x[1], &targets, options()).unwrap().unwrap().loss;
        let expected = |x: &[Tensor]| vec![plain_loss(&x[0], &x[1], &targets, 0.1)];
        let under_autocast = |x: &[Tensor]| {
            let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
            vec![loss(&[x[0].to_kind(Kind::BFloat16), x[1].shallow_clone()])]
        };
        let given = [hidden, weight];
        let (found, expected) = (results(&given, Kind::Float, under_autocast), results(&given, Kind::Double, expected));
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert!(distance(found, expected) < TOLERANCE, "{}", distance(found, expected));
        }
    }
}

/// Small whole numbers, so that every sum is exact.
fn whole(seed: i64, shape: &[i64]) -> Tensor {
    drawn(seed, || Tensor::randint_low(-3, 4, shape, (Kind::Float, Device::Cpu)))
}

/// So deep that sums are made in several parts, with and without an element that has no neighbour.
#[test]
fn whole_numbers_are_multiplied_exactly_on_any_number_of_threads() {
    if !is_served() {
        return;
    }
    for (rows, inputs, outputs) in [(1, 1, 1), (300, 1025, 70), (65, 2050, 129), (270, 5001, 200), (1100, 450, 1200)] {
        let (x, weight) = (whole(1, &[rows, inputs]), whole(2, &[outputs, inputs]));
        let (bias, residual) = (whole(3, &[outputs]), whole(4, &[rows, outputs]));
        let expected = x.linear(&weight, Some(&bias));
        for threads in [1, 2, 3] {
            tch::set_num_threads(threads);
            let weight = weight.copy().set_requires_grad(true);
            let given = x.to_kind(Kind::BFloat16).set_requires_grad(true);
            let (y, sum) = {
                let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
                let sum =
                    add_linear(&residual, &given, dense(&[weight.shallow_clone(), bias.shallow_clone()])).unwrap();
                (linear(&given, &weight, Some(&bias)).unwrap(), sum)
            };
            assert!(y.equal(&expected.to_kind(Kind::BFloat16)) && sum.equal(&(&expected + &residual)));
            let outside = whole(5, &[rows, outputs]);
            autograd::backward(&[(&y, Some(&outside.to_kind(Kind::BFloat16)))], true).unwrap();
            autograd::backward(&[(&y, Some(&outside.to_kind(Kind::BFloat16)))], false).unwrap();
            let of_x = outside.matmul(&weight.detach()).to_kind(Kind::BFloat16);
            assert!(given.grad().equal(&(of_x * 2.0)) && weight.grad().equal(&(outside.tr().matmul(&x) * 2.0)));
        }
    }
}

/// Gradients are kept where they were before, however they lie.
#[test]
fn a_gradient_that_lies_otherwise_is_added_to() {
    let weight = whole(1, &[6, 4]).set_requires_grad(true);
    let held = whole(2, &[4, 6]).tr();
    hvd_torch::set_grad(&weight, Some(&held)).unwrap();
    let x = whole(3, &[5, 4]);
    let y = {
        let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
        linear(&x.to_kind(Kind::BFloat16), &weight, None).unwrap()
    };
    autograd::backward(&[(&y, Some(&y.ones_like()))], false).unwrap();
    let expected = whole(2, &[4, 6]).tr() + Tensor::ones([6, 5], (Kind::Float, Device::Cpu)).matmul(&x);
    assert!(weight.grad().equal(&expected));
}

/// So many logits that they are computed in pieces: the gradients of the weights come from all of them.
#[test]
fn a_head_in_pieces_gives_the_same() {
    if !is_served() {
        return;
    }
    let (rows, vocabulary) = (300, 250_001);
    let (hidden, weight) = (values(3, &[rows, 4], 1.0), values(4, &[vocabulary, 4], 0.5));
    let targets = some_targets(5, rows, vocabulary);
    let given = [hidden, weight];
    let under_autocast = |x: &[Tensor]| {
        let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
        let hidden = x[0].to_kind(Kind::BFloat16);
        let made = linear_cross_entropy(&hidden, &x[1], &targets, options()).unwrap().unwrap();
        let alone = tch::no_grad(|| linear_cross_entropy(&hidden, &x[1], &targets, options()).unwrap().unwrap());
        assert!(distance(&alone.loss, &made.loss.to_kind(Kind::Double)) < 1e-3 && alone.correct.is_some());
        vec![made.loss * 0.3]
    };
    let plain = |x: &[Tensor]| vec![plain_loss(&x[0], &x[1], &targets, 0.1) * 0.3];
    let (found, expected) = (results(&given, Kind::Float, under_autocast), results(&given, Kind::Double, plain));
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(distance(found, expected) < TOLERANCE, "{at}: {}", distance(found, expected));
    }
}

/// An odd width of a head is left to torch, and a layer whose weight is of another type, too.
#[test]
fn what_is_not_served_is_left_to_torch() {
    let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
    let qkv = values(1, &[2, 9, 9], 1.0);
    let found = causal_attention(&qkv.to_kind(Kind::BFloat16), 1, &dropout(0.0, 2)).unwrap();
    assert!(distance(&found, &plain_attention(&qkv, 1, &dropout(0.0, 2))) < TOLERANCE);
    let (x, weight) = (values(2, &[4, 6], 1.0), values(3, &[5, 6], 1.0));
    let expected = x.linear::<Tensor>(&weight, None);
    for (x, weight) in [(Kind::BFloat16, Kind::BFloat16), (Kind::Float, Kind::Float), (Kind::Float, Kind::BFloat16)]
        .map(|(of_x, of_weight)| (x.to_kind(of_x), weight.to_kind(of_weight)))
    {
        let found = linear(&x, &weight, None).unwrap();
        assert_eq!(found.kind(), Kind::BFloat16);
        assert!(distance(&found, &expected) < TOLERANCE);
    }
    let ids = some_ids(4, 7, 5);
    assert_eq!(embedding(&weight.to_kind(Kind::Float), &ids).unwrap().kind(), Kind::Float);
}

#[test]
fn what_does_not_fit_is_an_error() {
    if !is_served() {
        return;
    }
    let floats = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let narrow = |shape: &[i64]| Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu));
    let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
    assert!(linear(&narrow(&[5, 4]), &floats(&[6, 3]), None).is_err());
    assert!(linear(&narrow(&[5, 4]), &floats(&[6, 4]), Some(&floats(&[5]))).is_err());
    assert!(linear_gelu(&narrow(&[5, 4]), dense(&[floats(&[6, 4]), floats(&[5])])).is_err());
    let mlp = |down: &[i64]| {
        let layers = [floats(&[6, 4]), floats(&[6]), floats(down), floats(&[4])];
        add_mlp(&floats(&[5, 4]), &narrow(&[5, 4]), [dense(&layers), dense(&layers[2..])]).map(drop)
    };
    assert!(mlp(&[4, 6]).is_ok() && mlp(&[24]).is_err() && mlp(&[4, 2, 3]).is_err() && mlp(&[4, 5]).is_err());
    let add = |residual: &[i64], bias: &[i64]| {
        add_linear(&floats(residual), &narrow(&[5, 4]), dense(&[floats(&[6, 4]), floats(bias)])).map(drop)
    };
    assert!(add(&[5, 6], &[6]).is_ok());
    assert!(add(&[4, 6], &[6]).is_err() && add(&[5, 1], &[6]).is_err() && add(&[5, 6], &[5]).is_err());
    let head = |targets: &[i64]| {
        linear_cross_entropy(&narrow(&[2, 4]), &floats(&[5, 4]), &Tensor::from_slice(targets), options()).map(drop)
    };
    assert!(head(&[0, 5]).unwrap_err().to_string().contains("the target 5 is not in a vocabulary of 5"));
    assert!(head(&[-1, 0]).is_err() && head(&[0]).is_err());
}

#[test]
fn what_is_no_number_stays_none() {
    let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
    for bad in [f64::NAN, f64::INFINITY] {
        let mut row = vec![0.5f64; 48];
        row[7] = bad;
        let x = Tensor::from_slice(&row).view([4, 12]).to_kind(Kind::BFloat16);
        let (weight, bias) =
            (Tensor::ones([6, 12], (Kind::Float, Device::Cpu)), Tensor::zeros([6], (Kind::Float, Device::Cpu)));
        let is_finite = |x: &Tensor| x.isfinite().all().int64_value(&[]) == 1;
        assert!(!is_finite(&linear(&x, &weight, Some(&bias)).unwrap()));
        assert!(!is_finite(&linear_gelu(&x, dense(&[weight.shallow_clone(), bias])).unwrap()));
        assert!(!is_finite(&causal_attention(&x.view([1, 4, 12]), 2, &dropout(0.0, 1)).unwrap()));
        let targets = Tensor::zeros([4], (Kind::Int64, Device::Cpu));
        if let Some(made) = linear_cross_entropy(&x, &weight, &targets, options()).unwrap() {
            assert!(!made.loss.double_value(&[]).is_finite());
        }
    }
}
