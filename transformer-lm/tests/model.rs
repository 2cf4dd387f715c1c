//! The model against an independent computation, and what its interface promises.

mod support;

use std::sync::{Mutex, PoisonError};

use support::reference::Reference;
use support::{distance, ids, lively_model, tiny};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use transformer_lm::model::{IGNORE_INDEX, ModelConfig, Positions, TransformerLM};

/// Tests that draw from torch's generator take turns.
static GENERATOR: Mutex<()> = Mutex::new(());

fn two_sequences() -> Vec<Vec<usize>> {
    vec![vec![3, 0, 10, 4, 4, 1], vec![9, 2, 2, 0, 6, 5]]
}

fn tensor_of(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, rows[0].len() as i64])
}

#[test]
fn logits_agree_with_plain_loops() {
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 2e-5)] {
        let (_store, model) = lively_model(&tiny(), kind);
        let reference = Reference::of(&model.parameters(), &tiny());
        let rows = two_sequences();
        let (logits, loss) = model.forward_t(&ids(&rows), None, None, false).unwrap();
        assert!(loss.is_none());
        assert_eq!(logits.kind(), kind);
        for (row, sequence) in rows.iter().enumerate() {
            let expected = tensor_of(&reference.logits(sequence, &[true; 6]));
            let error = distance(&logits.get(row as i64), &expected);
            assert!(error < tolerance, "{kind:?}: {error}");
        }
    }
}

#[test]
fn sinusoidal_positions_are_sines_and_cosines_and_no_parameters() {
    let config = ModelConfig { positions: Positions::Sinusoidal, ..tiny() };
    let (_store, model) = lively_model(&config, Kind::Double);
    let mut reference = Reference::of(&model.parameters(), &config);
    assert_eq!(reference.parameters.values().map(Vec::len).sum::<usize>(), config.parameter_count());
    let angle = |t: usize, i: usize| t as f64 * (-(10_000f64.ln()) * (2 * i) as f64 / 8.0).exp();
    let row = |t: usize| (0..4).flat_map(move |i| [angle(t, i).sin(), angle(t, i).cos()]);
    assert!(reference.parameters.insert("wpe.weight".into(), (0..6).flat_map(row).collect()).is_none());
    let rows = two_sequences();
    let logits = model.forward_t(&ids(&rows), None, None, false).unwrap().0;
    let expected = tensor_of(&reference.logits(&rows[1], &[true; 6]));
    assert!(distance(&logits.get(1), &expected) < 1e-12);
}

#[test]
fn every_gradient_agrees_with_finite_differences() {
    let (_store, model) = lively_model(&tiny(), Kind::Double);
    let mut reference = Reference::of(&model.parameters(), &tiny());
    let rows = two_sequences();
    let targets = vec![vec![0, 10, 4, IGNORE_INDEX, 1, 2], vec![2, 2, 0, 6, 5, IGNORE_INDEX]];
    let sums = model.loss_sum(&ids(&rows), &Tensor::from_slice2(&targets), None, true, false).unwrap();
    assert_eq!(sums.tokens, 10);
    assert!((sums.loss.double_value(&[]) - reference.loss_sum(&rows, &targets)).abs() < 1e-11);
    sums.loss.backward();
    let step = 1e-5;
    for (name, parameter) in model.parameters() {
        let gradient = Vec::<f64>::try_from(parameter.grad().view([-1])).unwrap();
        for (i, gradient) in gradient.into_iter().enumerate() {
            let mut loss_at = |offset: f64| {
                let original = reference.parameters[&name][i];
                reference.parameters.get_mut(&name).unwrap()[i] = original + offset;
                let loss = reference.loss_sum(&rows, &targets);
                reference.parameters.get_mut(&name).unwrap()[i] = original;
                loss
            };
            let expected = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            assert!((gradient - expected).abs() < 1e-7 * (1.0 + expected.abs()), "{name}[{i}]: {gradient} {expected}");
        }
    }
}

#[test]
fn a_token_changes_nothing_before_it() {
    let (_store, model) = lively_model(&tiny(), Kind::Double);
    let mut rows = two_sequences();
    let before = model.forward_t(&ids(&rows), None, None, false).unwrap().0;
    rows[0][3] = 8;
    let after = model.forward_t(&ids(&rows), None, None, false).unwrap().0;
    let part = |logits: &Tensor, start, len| logits.get(0).narrow(0, start, len);
    assert_eq!(part(&before, 0, 3), part(&after, 0, 3));
    assert!(distance(&part(&before, 3, 3), &part(&after, 3, 3)) > 1e-3);
    assert_eq!(before.get(1), after.get(1));
}

#[test]
fn masked_tokens_are_seen_by_nobody() {
    let (_store, model) = lively_model(&tiny(), Kind::Double);
    let reference = Reference::of(&model.parameters(), &tiny());
    let rows = two_sequences();
    // Padding on the left, and a hole: row 0 of the first has no key but itself.
    let visible = [vec![false, false, true, true, true, true], vec![true, true, true, false, true, true]];
    let mask: Vec<Vec<i64>> = visible.iter().map(|row| row.iter().map(|&v| i64::from(v)).collect()).collect();
    let mask = Tensor::from_slice2(&mask);
    for mask in [mask.shallow_clone(), mask.to_kind(Kind::Bool), mask.to_kind(Kind::Float)] {
        let (logits, loss) = model.forward_t(&ids(&rows), Some(&mask), Some(&ids(&rows)), true).unwrap();
        for (row, sequence) in rows.iter().enumerate() {
            let expected = tensor_of(&reference.logits(sequence, &visible[row]));
            assert!(distance(&logits.get(row as i64), &expected) < 1e-12);
        }
        loss.unwrap().backward();
        for (name, parameter) in model.parameters() {
            assert_eq!(parameter.grad().isfinite().all().int64_value(&[]), 1, "{name}");
        }
    }
}

#[test]
fn labels_are_shifted_inside_and_some_left_out() {
    let (_store, model) = lively_model(&tiny(), Kind::Double);
    let reference = Reference::of(&model.parameters(), &tiny());
    let rows = two_sequences();
    let labels = vec![vec![99, 0, IGNORE_INDEX, 4, 4, 1], vec![IGNORE_INDEX, 2, 2, 0, 6, IGNORE_INDEX]];
    let targets: Vec<Vec<i64>> =
        labels.iter().map(|row| row[1..].iter().copied().chain([IGNORE_INDEX]).collect()).collect();
    let loss = model.forward_t(&ids(&rows), None, Some(&Tensor::from_slice2(&labels)), false).unwrap().1.unwrap();
    assert!((loss.double_value(&[]) - reference.loss_sum(&rows, &targets) / 8.0).abs() < 1e-12);

    let nothing = Tensor::full([2, 6], IGNORE_INDEX, (Kind::Int64, Device::Cpu));
    let loss = model.forward_t(&ids(&rows), None, Some(&nothing), false).unwrap().1.unwrap();
    assert_eq!(loss.double_value(&[]), 0.0);
}

#[test]
fn a_batch_predicts_all_its_tokens_but_the_first() {
    let (_store, model) = lively_model(&tiny(), Kind::Double);
    let rows = [vec![3, 0, 10, 4, 4, 1, 9], vec![1, 2, 3, 4, 5, 6, 7]];
    let batch = ids(&rows);
    let sums = model.batch_loss(&batch, false, true).unwrap();
    assert_eq!(sums.tokens, 12);
    let inputs: Vec<Vec<usize>> = rows.iter().map(|row| row[..6].to_vec()).collect();
    let targets: Vec<Vec<i64>> = rows.iter().map(|row| row[1..].iter().map(|&id| id as i64).collect()).collect();
    let expected = Reference::of(&model.parameters(), &tiny()).loss_sum(&inputs, &targets);
    assert!((sums.loss.double_value(&[]) - expected).abs() < 1e-11);
    let logits = model.forward_t(&batch.narrow(1, 0, 6), None, None, false).unwrap().0;
    let right = logits.argmax(2, false).eq_tensor(&batch.narrow(1, 1, 6)).sum(Kind::Int64).int64_value(&[]);
    assert_eq!(sums.correct.unwrap().int64_value(&[]), right);
}

#[test]
fn first_weights_depend_on_the_seed_and_on_nothing_else() {
    let config = ModelConfig { d_model: 64, vocab_size: 500, d_ff: 256, max_seq_len: 200, ..tiny() };
    let weights = |kind, seed| {
        let mut store = VarStore::new(Device::Cpu);
        store.set_kind(kind);
        tch::manual_seed(seed as i64 * 31);
        TransformerLM::new(&store.root(), &config, seed).unwrap().parameters()
    };
    let (float, double, other) = (weights(Kind::Float, 5), weights(Kind::Double, 5), weights(Kind::Float, 6));
    assert_eq!(float.iter().map(|(_, t)| t.numel()).sum::<usize>(), config.parameter_count());
    for (((name, a), (_, b)), (_, c)) in float.iter().zip(&double).zip(&other) {
        assert_eq!(a.to_kind(Kind::Double), *b, "{name}");
        let drawn = a.dim() == 2;
        assert_eq!(drawn, a != c, "{name}");
        let residual = name.ends_with("c_proj.weight");
        let expected = match (drawn, residual) {
            (true, true) => 0.02 / 6f64.sqrt(),
            (true, false) => 0.02,
            (false, _) => 0.0,
        };
        let (mean, std) = (a.mean(Kind::Double).double_value(&[]), a.std(false).double_value(&[]));
        assert!((std - expected).abs() <= 0.07 * expected, "{name}: {std}");
        let one = !drawn && name.contains("ln_") && name.ends_with("weight");
        assert!((mean - f64::from(u8::from(one))).abs() < 2e-3, "{name}: {mean}");
    }
}

#[test]
fn parameters_have_gpt2s_names_and_torchs_shapes() {
    let (store, model) = lively_model(&ModelConfig { n_layers: 1, ..tiny() }, Kind::Float);
    let named: Vec<String> = model.parameters().iter().map(|(name, t)| format!("{name} {:?}", t.size())).collect();
    let expected = [
        "wte.weight [11, 8]",
        "wpe.weight [6, 8]",
        "h.0.ln_1.weight [8]",
        "h.0.ln_1.bias [8]",
        "h.0.attn.c_attn.weight [24, 8]",
        "h.0.attn.c_attn.bias [24]",
        "h.0.attn.c_proj.weight [8, 8]",
        "h.0.attn.c_proj.bias [8]",
        "h.0.ln_2.weight [8]",
        "h.0.ln_2.bias [8]",
        "h.0.mlp.c_fc.weight [12, 8]",
        "h.0.mlp.c_fc.bias [12]",
        "h.0.mlp.c_proj.weight [8, 12]",
        "h.0.mlp.c_proj.bias [8]",
        "ln_f.weight [8]",
        "ln_f.bias [8]",
    ];
    assert_eq!(named, expected);
    assert_eq!(store.variables().len(), expected.len());
}

#[test]
fn dropout_follows_the_seed_and_rests_outside_training() {
    let config = ModelConfig { dropout: 0.3, ..tiny() };
    let (_store, model) = lively_model(&config, Kind::Float);
    let batch = ids(&two_sequences());
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let run = |seed, train| {
        tch::manual_seed(seed);
        model.forward_t(&batch, None, None, train).unwrap().0
    };
    assert_eq!(run(1, true), run(1, true));
    assert_ne!(run(1, true), run(2, true));
    assert_eq!(run(1, false), run(2, false));
}

/// With a mask that hides nothing, attention goes another way.
#[test]
fn dropout_is_the_same_with_and_without_an_attention_mask() {
    let config = ModelConfig { dropout: 0.3, ..tiny() };
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 2e-5)] {
        let (_store, model) = lively_model(&config, kind);
        let batch = ids(&two_sequences());
        let run = |mask: Option<&Tensor>| {
            tch::manual_seed(5);
            model.forward_t(&batch, mask, None, true).unwrap().0
        };
        let error = distance(&run(None), &run(Some(&batch.ones_like())));
        assert!(error < tolerance, "{kind:?}: {error}");
        assert!(distance(&run(None), &model.forward_t(&batch, None, None, false).unwrap().0) > 0.1);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    type Change = fn(&mut ModelConfig);
    let cases: [(Change, &str); 9] = [
        (|c| c.vocab_size = 0, "model.vocab_size"),
        (|c| c.d_model = 0, "model.d_model"),
        (|c| c.n_heads = 0, "model.n_heads"),
        (|c| c.n_heads = 3, "model.n_heads = 3 does not divide model.d_model = 8"),
        (|c| c.n_layers = 0, "model.n_layers"),
        (|c| c.d_ff = usize::MAX, "model.d_ff"),
        (|c| c.dropout = 1.0, "model.dropout"),
        (|c| c.dropout = f64::NAN, "model.dropout"),
        (|c| c.label_smoothing = 1.0, "model.label_smoothing"),
    ];
    for (change, message) in cases {
        let mut config = tiny();
        change(&mut config);
        let error = TransformerLM::new(&VarStore::new(Device::Cpu).root(), &config, 0).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn inputs_that_do_not_fit_are_errors() {
    let (_store, model) = lively_model(&tiny(), Kind::Float);
    let fine = ids(&two_sequences());
    let refusal = |ids: &Tensor, mask: Option<&Tensor>, labels: Option<&Tensor>| {
        model.forward_t(ids, mask, labels, false).unwrap_err().to_string()
    };
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Int64, Device::Cpu));
    assert!(refusal(&zeros(&[1, 7]), None, None).contains("at most 6 (max_seq_len)"));
    assert!(refusal(&zeros(&[6]), None, None).contains("expected Int64 (sequences, tokens)"));
    assert!(refusal(&zeros(&[0, 6]), None, None).contains("not empty"));
    assert!(refusal(&fine.to_kind(Kind::Float), None, None).contains("expected Int64"));
    assert!(refusal(&(&fine + 1), None, None).contains("token ids from 1 to 11; this model's vocabulary is 0 to 10"));
    assert!(refusal(&(&fine - 3), None, None).contains("token ids from -3"));
    assert!(refusal(&fine, Some(&zeros(&[2, 5])), None).contains("attention_mask of [2, 5]"));
    assert!(refusal(&fine, None, Some(&zeros(&[2, 5]))).contains("labels of [2, 5]"));
    assert!(refusal(&fine, None, Some(&(&fine + 1))).contains("vocabulary"));
    assert!(model.batch_loss(&zeros(&[2, 1]), false, false).is_err());
}

#[test]
fn bf16_computes_close_to_f32_and_keeps_its_loss_and_gradients_in_f32() {
    let (_store, model) = lively_model(&tiny(), Kind::Float);
    let batch = ids(&two_sequences());
    let exact = model.batch_loss(&batch, true, false).unwrap().loss;
    let rounded = {
        let _autocast = hvd_torch::Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
        model.batch_loss(&batch, true, false).unwrap().loss
    };
    assert_eq!(rounded.kind(), Kind::Float);
    let (exact, value) = (exact.double_value(&[]), rounded.double_value(&[]));
    assert!(exact != value && (exact - value).abs() < 0.03 * exact, "{exact} {value}");
    rounded.backward();
    for (name, parameter) in model.parameters() {
        assert_eq!(
            (parameter.grad().kind(), parameter.grad().isfinite().all().int64_value(&[])),
            (Kind::Float, 1),
            "{name}"
        );
    }
}
