//! Training beside an independent program in PyTorch (`tests/pytorch/parity.py`): the same weights, the same data.

mod support;

use std::path::Path;

use serde_json::json;
use support::python;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use transformer_lm::config::TrainingSection;
use transformer_lm::model::random::Generator;
use transformer_lm::model::{Backward, TransformerLM, copy_weights, read_weights};
use transformer_lm::trainer::{BatchPlan, Learner, Schedule, Setup, setup_horovod};
use transformer_lm::{Config, ModelConfig};

const STEPS: i64 = 10;
const MICRO_BATCHES: i64 = 2;

/// What differs between the runs, and how far apart the results may be as ‖a − b‖ / ‖b‖ of a tensor.
struct Case {
    name: &'static str,
    model: &'static str,
    amp_dtype: &'static str,
    kind: Kind,
    logits: f64,
    gradients: f64,
    weights: f64,
}

const CASES: &[Case] = &[
    Case {
        name: "fp64",
        model: "",
        amp_dtype: "fp64",
        kind: Kind::Double,
        logits: 1e-9,
        gradients: 1e-9,
        weights: 1e-9,
    },
    Case {
        name: "fp64, sinusoidal, gradient checkpointing",
        model: ", positions: sinusoidal",
        amp_dtype: "fp64, gradient_checkpointing: true",
        kind: Kind::Double,
        logits: 1e-9,
        gradients: 1e-9,
        weights: 1e-9,
    },
    Case {
        name: "fp32",
        model: "",
        amp_dtype: "fp32",
        kind: Kind::Float,
        logits: 1e-5,
        gradients: 1e-5,
        weights: 1e-4,
    },
];

#[test]
fn logits_gradients_and_weights_agree_with_pytorch() {
    let Some(python) = python::python() else { return };
    let setup = setup_horovod(false).unwrap();
    for case in CASES {
        compare(case, &setup, &python);
    }
}

fn compare(case: &Case, setup: &Setup, python: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (config, data) = (config(case), data());
    let shape = config.model_config(0);
    let weights = lively_weights(&config, &shape, case.kind);
    Tensor::write_safetensors(&weights, path("weights.safetensors")).unwrap();
    Tensor::write_safetensors(&[("tokens", &data)], path("data.safetensors")).unwrap();
    std::fs::write(path("settings.json"), settings(&config).to_string()).unwrap();
    python::run(python, "parity.py", &[folder.path()]);

    let read = |name: &str| read_weights(&path(name)).unwrap();
    let (logits, gradients) = first_step(&shape, &weights, case.kind, &data);
    let (trained, losses) = train(&config, &shape, &weights, &data, setup);
    let theirs: Vec<f64> = serde_json::from_slice(&std::fs::read(path("losses.json")).unwrap()).unwrap();
    let losses = [("losses".to_string(), Tensor::from_slice(&losses))];
    let theirs = [("losses".to_string(), Tensor::from_slice(&theirs))];
    let figures = [
        ("logits", agree(&[("logits".into(), logits)], &read("logits.safetensors"), case.logits)),
        ("losses", agree(&losses, &theirs, case.logits)),
        ("gradients", agree(&gradients, &read("gradients.safetensors"), case.gradients)),
        ("weights", agree(&trained, &read("trained.safetensors"), case.weights)),
    ];
    let figures: Vec<String> = figures.iter().map(|(what, figure)| format!("{what} {figure:.1e}")).collect();
    println!("{}: largest ‖a − b‖ / ‖b‖: {}", case.name, figures.join(", "));
}

fn config(case: &Case) -> Config {
    let yaml = format!(
        "model: {{d_model: 48, n_heads: 4, n_layers: 3, d_ff: 160, max_seq_len: 24, dropout: 0.0, vocab_size: 65, pad_token_id: null{}}}\n\
         training: {{learning_rate: 0.002, warmup_steps: 5, lr_schedule: constant, weight_decay: 0.1, betas: [0.9, 0.95], \
         max_grad_norm: 0.25, per_gpu_batch_size: 3, gradient_accumulation_steps: {MICRO_BATCHES}, amp_dtype: {}, device: cpu}}\n",
        case.model, case.amp_dtype
    );
    Config::from_yaml(&yaml, "parity").unwrap()
}

fn settings(config: &Config) -> serde_json::Value {
    let TrainingSection { learning_rate, warmup_steps, weight_decay, betas, eps, max_grad_norm, .. } = config.training;
    json!({
        "heads": config.model.n_heads, "layers": config.model.n_layers, "learning_rate": learning_rate,
        "warmup_steps": warmup_steps, "weight_decay": weight_decay, "betas": betas, "eps": eps, "max_grad_norm": max_grad_norm,
    })
}

/// (steps, micro-batches, B, T+1): every micro-batch counts up from random tokens, so there is something to learn.
fn data() -> Tensor {
    let mut generator = Generator::new(3, 0);
    let row = |_| {
        let (start, step) = (generator.bits() % 65, generator.bits() % 5);
        (0..25u64).map(move |t| ((start + t * step + t * t % 3) % 65) as i64).collect::<Vec<_>>()
    };
    let tokens: Vec<i64> = (0..STEPS * MICRO_BATCHES * 3).flat_map(row).collect();
    Tensor::from_slice(&tokens).view([STEPS, MICRO_BATCHES, 3, 25])
}

/// First weights of which none is 0, so that every term counts.
fn lively_weights(config: &Config, shape: &ModelConfig, kind: Kind) -> Vec<(String, Tensor)> {
    let (_store, model) = model(shape, kind, config.seed.0);
    let mut generator = Generator::new(9, 0);
    let mut lively = |tensor: Tensor| {
        let noise: Vec<f64> = (0..tensor.numel()).map(|_| 0.05 * generator.normal_pair().0).collect();
        (tensor.detach() + Tensor::from_slice(&noise).view(&tensor.size()[..])).to_kind(kind)
    };
    model.parameters().into_iter().map(|(name, tensor)| (name, lively(tensor))).collect()
}

fn model(shape: &ModelConfig, kind: Kind, seed: u64) -> (VarStore, TransformerLM) {
    let mut store = VarStore::new(Device::Cpu);
    store.set_kind(kind);
    let model = TransformerLM::new(&store.root(), shape, seed).unwrap();
    (store, model)
}

fn shared(weights: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    weights.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// Logits of the first micro-batch, and gradients of the mean loss over the first step.
fn first_step(
    shape: &ModelConfig,
    weights: &[(String, Tensor)],
    kind: Kind,
    data: &Tensor,
) -> (Tensor, Vec<(String, Tensor)>) {
    let (_store, model) = model(shape, kind, 0);
    copy_weights(&model, shared(weights), Path::new("weights")).unwrap();
    let batch = |micro: i64| data.get(0).get(micro);
    let logits = model.forward_t(&batch(0).narrow(1, 0, 24), None, None, true).unwrap().0.detach();
    let how = Backward { factor: 1.0 / (MICRO_BATCHES * 3 * 24) as f64, accuracy: false, autocast: None };
    (0..MICRO_BATCHES).for_each(|micro| drop(model.backward(&batch(micro), &how).unwrap()));
    let gradients = model.parameters().into_iter().map(|(name, tensor)| (name, tensor.grad())).collect();
    (logits, gradients)
}

/// The weights after all steps of the trainer, and the loss before each.
fn train(
    config: &Config,
    shape: &ModelConfig,
    weights: &[(String, Tensor)],
    data: &Tensor,
    setup: &Setup,
) -> (Vec<(String, Tensor)>, Vec<f64>) {
    let plan = BatchPlan::new(&config.training, 1, usize::MAX).unwrap();
    assert_eq!((plan.micro, plan.accumulation as i64), (3, MICRO_BATCHES));
    let schedule = Schedule::new(&config.training, 1, STEPS as u64);
    let mut learner = Learner::new(config, shape, &plan, &setup.world, Device::Cpu).unwrap();
    copy_weights(&learner.model, shared(weights), Path::new("weights")).unwrap();
    let mut update = |step: i64| {
        let batches: Vec<Tensor> = (0..MICRO_BATCHES).map(|micro| data.get(step).get(micro)).collect();
        let update = learner.update(&batches, schedule.at(step as u64), step as u64, false).unwrap();
        assert!(update.skipped.is_none());
        update.sums.mean_loss()
    };
    let losses = (0..STEPS).map(&mut update).collect();
    (learner.model.parameters(), losses)
}

/// The largest relative distance of `ours` from `theirs`, all of which must be within `tolerance`.
///
/// The loss does not depend on the bias of attention's keys: its gradient is rounding, and so is what AdamW makes of it.
/// It is compared absolutely, beside the bias's other two thirds.
fn agree(ours: &[(String, Tensor)], theirs: &[(String, Tensor)], tolerance: f64) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let mut largest: f64 = 0.0;
    for (name, ours) in ours {
        let theirs = &theirs.iter().find(|(other, _)| other == name).unwrap_or_else(|| panic!("{name} is missing")).1;
        assert_eq!(ours.size(), theirs.size(), "{name}");
        let (ours, theirs) = (ours.detach().to_kind(Kind::Double), theirs.to_kind(Kind::Double));
        let parts = if name.ends_with("c_attn.bias") { 3 } else { 1 };
        for (part, (ours, theirs)) in ours.chunk(parts, 0).iter().zip(theirs.chunk(parts, 0)).enumerate() {
            let distance = (ours - &theirs).norm().double_value(&[]);
            if parts == 3 && part == 1 {
                assert!(distance <= 10.0 * tolerance, "{name}, keys: {distance:.3e} (absolute)");
                continue;
            }
            let distance = distance / theirs.norm().double_value(&[]);
            assert!(distance <= tolerance, "{name}: {distance:.3e}, expected at most {tolerance:.0e}");
            largest = largest.max(distance);
        }
    }
    largest
}
