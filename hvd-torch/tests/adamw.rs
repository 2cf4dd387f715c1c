//! AdamW against the textbook in plain f64, its state, and the norm of gradients.

mod common;

use common::{numbers, values};
use hvd_torch::{AdamW, Optimizer, ParamGroup, TchOptimizer, foreach};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};

const BETAS: (f64, f64) = (0.9, 0.95);
const EPS: f64 = 1e-8;

/// AdamW as the paper has it, element by element.
struct Textbook {
    x: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    t: i32,
}

impl Textbook {
    fn new(x: Vec<f64>) -> Self {
        Textbook { m: vec![0.0; x.len()], v: vec![0.0; x.len()], x, t: 0 }
    }

    fn step(&mut self, g: &[f64], lr: f64, decay: f64) {
        self.t += 1;
        let (b1, b2) = BETAS;
        let (m_scale, v_scale) = (1.0 - b1.powi(self.t), 1.0 - b2.powi(self.t));
        for (((x, m), v), g) in self.x.iter_mut().zip(&mut self.m).zip(&mut self.v).zip(g) {
            *x -= lr * decay * *x;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *x -= lr * (*m / m_scale) / ((*v / v_scale).sqrt() + EPS);
        }
    }
}

fn param(at: i64, size: &[i64], kind: Kind) -> Tensor {
    numbers(size, kind, at).detach().set_requires_grad(true)
}

/// Two groups: `a` with weight decay, `b` and `unused` without.
fn two_groups(kind: Kind) -> (AdamW, Tensor, Tensor) {
    let (a, b, unused) = (param(1, &[5, 7], kind), param(2, &[19], kind), param(3, &[4], kind));
    let named = |name: &str, tensor: &Tensor| (name.to_string(), tensor.shallow_clone());
    let groups = vec![
        ParamGroup { params: vec![named("a", &a)], lr: 1e-2, weight_decay: 0.1 },
        ParamGroup { params: vec![named("b", &b), named("unused", &unused)], lr: 3e-2, weight_decay: 0.0 },
    ];
    (AdamW::new(groups, BETAS, EPS).unwrap(), a, b)
}

fn backward(a: &Tensor, b: &Tensor, step: i64) {
    let noise = numbers(&[19], Kind::Double, 1000 + step);
    let loss = a.to_kind(Kind::Double).sin().sum(Kind::Double) + ((b * noise) + 1.0).square().sum(Kind::Double);
    loss.backward();
}

/// The largest relative difference to the textbook after some steps.
fn drift(kind: Kind, steps: i64) -> f64 {
    let (mut adamw, a, b) = two_groups(kind);
    let mut books = [Textbook::new(values(&a)), Textbook::new(values(&b))];
    for step in 0..steps {
        adamw.zero_grad().unwrap();
        backward(&a, &b, step);
        if step == 3 {
            adamw.set_lr(5e-3);
        }
        let lr = if step < 3 { [1e-2, 3e-2] } else { [5e-3, 5e-3] };
        books[0].step(&values(&a.grad()), lr[0], 0.1);
        books[1].step(&values(&b.grad()), lr[1], 0.0);
        adamw.step().unwrap();
    }
    let pairs = [(values(&a), &books[0].x), (values(&b), &books[1].x)];
    let worst = pairs.iter().flat_map(|(ours, book)| ours.iter().zip(book.iter()).map(|(x, y)| (x - y).abs()));
    worst.fold(0.0, f64::max)
}

#[test]
fn follows_the_textbook() {
    assert!(drift(Kind::Double, 12) < 1e-12);
    let single = drift(Kind::Float, 12);
    assert!(single < 1e-5, "{single}");
    let brain = drift(Kind::BFloat16, 12);
    assert!(brain < 0.05, "{brain}");
}

#[test]
fn unused_parameters_stay() {
    let (mut adamw, a, b) = two_groups(Kind::Double);
    let before = values(&adamw.parameters()[2].1);
    backward(&a, &b, 0);
    adamw.step().unwrap();
    let state = adamw.state().unwrap();
    let step = |name: &str| state.iter().find(|(other, _)| other == name).unwrap().1.double_value(&[]);
    assert_eq!((step("step.a"), step("step.b"), step("step.unused")), (1.0, 1.0, 0.0));
    assert_eq!(values(&adamw.parameters()[2].1), before);
}

#[test]
fn a_resumed_run_has_the_same_bits() {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        let run = |adamw: &mut AdamW, a: &Tensor, b: &Tensor, steps: std::ops::Range<i64>| {
            for step in steps {
                adamw.zero_grad().unwrap();
                backward(a, b, step);
                adamw.step().unwrap();
            }
        };
        let copy = |list: Vec<(String, Tensor)>| -> Vec<(String, Tensor)> {
            list.into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect()
        };
        let (mut straight, a, b) = two_groups(kind);
        run(&mut straight, &a, &b, 0..4);
        let saved = (copy(straight.parameters()), copy(straight.state().unwrap()));
        run(&mut straight, &a, &b, 4..8);

        let (mut resumed, c, d) = two_groups(kind);
        tch::no_grad(|| {
            for ((_, mut own), (_, saved)) in resumed.parameters().into_iter().zip(&saved.0) {
                own.copy_(saved);
            }
        });
        resumed.load_state(&saved.1).unwrap();
        run(&mut resumed, &c, &d, 4..8);
        assert_eq!((values(&a), values(&b)), (values(&c), values(&d)), "{kind:?}");
        let bits = |adamw: &AdamW| adamw.state().unwrap().iter().map(|(_, t)| values(t)).collect::<Vec<_>>();
        assert_eq!(bits(&straight), bits(&resumed));
    }
}

#[test]
fn state_that_does_not_fit_is_refused_and_changes_nothing() {
    let (mut adamw, a, b) = two_groups(Kind::Double);
    backward(&a, &b, 0);
    adamw.step().unwrap();
    let shallow = || adamw.state().unwrap();
    let (mut missing, mut unknown, mut shape, mut twice) = (shallow(), shallow(), shallow(), shallow());
    drop(missing.remove(0));
    unknown.push(("exp_avg.other".into(), Tensor::from(1.0)));
    shape[1].1 = Tensor::zeros([2], (Kind::Double, Device::Cpu));
    twice.push(twice[0].shallow());
    let before: Vec<_> = shallow().iter().map(|(_, tensor)| values(tensor)).collect();
    for (state, expected) in [
        (missing, "lacks `exp_avg.a`"),
        (unknown, "has `exp_avg.other`, which this model lacks"),
        (shape, "`exp_avg_sq.a`"),
        (twice, "`exp_avg.a` twice"),
    ] {
        let error = adamw.load_state(&state).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(before, adamw.state().unwrap().iter().map(|(_, tensor)| values(tensor)).collect::<Vec<_>>());
}

trait Shallow {
    fn shallow(&self) -> Self;
}

impl Shallow for (String, Tensor) {
    fn shallow(&self) -> Self {
        (self.0.clone(), self.1.shallow_clone())
    }
}

#[test]
fn parameters_that_cannot_be_updated_are_refused() {
    let new = |params: Vec<(&str, Tensor)>, lr: f64| {
        let params = params.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect();
        AdamW::new(vec![ParamGroup { params, lr, weight_decay: 0.0 }], BETAS, EPS).map(drop).unwrap_err().to_string()
    };
    let good = || param(1, &[2], Kind::Float);
    assert!(new(vec![], 0.1).contains("no parameters"));
    assert!(new(vec![("x", good()), ("x", good())], 0.1).contains("two parameters are named `x`"));
    assert!(new(vec![("x", good().detach())], 0.1).contains("requires_grad: false"));
    assert!(new(vec![("x", good() * 2.0)], 0.1).contains("leaf: false"));
    let transposed = numbers(&[3, 2], Kind::Float, 1).tr().set_requires_grad(true);
    assert!(new(vec![("x", transposed)], 0.1).contains("contiguous: false"));
    assert!(new(vec![("x", good())], f64::NAN).contains("learning rate"));
}

#[test]
fn tch_optimizers_work_but_keep_their_state() {
    let vars = nn::VarStore::new(Device::Cpu);
    let x = vars.root().var_copy("x", &Tensor::from_slice(&[1.0f32, -2.0]));
    let native = nn::sgd(0.0, 0.0, 0.0, false).build(&vars, 0.25).unwrap();
    let mut sgd = TchOptimizer::new(native, &vars).unwrap();
    assert_eq!(sgd.parameters()[0].0, "x");
    for _ in 0..2 {
        sgd.zero_grad().unwrap();
        (&x * &x).sum(Kind::Float).backward();
        sgd.step().unwrap();
    }
    assert_eq!(values(&x), [0.25, -0.5]);
    let error = sgd.state().unwrap_err().to_string();
    assert!(error.contains("cannot be saved") && error.contains("AdamW"), "{error}");
    assert!(sgd.load_state(&[]).is_err());
    let _ = vars.root().zeros("y", &[1]);
    assert!(sgd.step().unwrap_err().to_string().contains("from 1 to 2"));
}

#[test]
fn the_total_norm_does_not_depend_on_threads() {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
        let tensors = [numbers(&[300_001], kind, 1), numbers(&[17], kind, 2), numbers(&[0], kind, 3)];
        let expected: f64 = tensors.iter().flat_map(values).map(|x| x * x).sum::<f64>().sqrt();
        let threads = tch::get_num_threads();
        let norms: Vec<f64> = [1, 2, 3]
            .map(|n| {
                tch::set_num_threads(n);
                foreach::total_norm(&tensors).unwrap()
            })
            .into();
        tch::set_num_threads(threads);
        assert!(norms.iter().all(|norm| norm.to_bits() == norms[0].to_bits()), "{norms:?}");
        assert!((norms[0] / expected - 1.0).abs() < 1e-13, "{kind:?}: {} {expected}", norms[0]);
        if kind == Kind::Double {
            let by_torch = foreach::norm(&tensors[..1]).unwrap()[0];
            assert!((by_torch / foreach::total_norm(&tensors[..1]).unwrap() - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn clipping_spares_what_is_small_or_not_finite() {
    let grads = [Tensor::from_slice(&[3.0, 0.0]), Tensor::from_slice(&[4.0])];
    let norm = foreach::total_norm(&grads).unwrap();
    assert_eq!(norm, 5.0);
    foreach::clip_(&grads, norm, 6.0).unwrap();
    assert_eq!(values(&grads[0]), [3.0, 0.0]);
    foreach::clip_(&grads, norm, 1.0).unwrap();
    assert!((foreach::total_norm(&grads).unwrap() - 1.0).abs() < 1e-6);
    foreach::clip_(&grads, f64::INFINITY, 1.0).unwrap();
    assert!((foreach::total_norm(&grads).unwrap() - 1.0).abs() < 1e-6);
    assert!(foreach::total_norm(&[Tensor::from_slice(&[f32::NAN])]).unwrap().is_nan());
    assert!(foreach::total_norm(&[Tensor::from_slice(&[1i64])]).is_err());
}
