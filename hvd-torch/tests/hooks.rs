//! Hooks and gradients through the shim.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::values;
use hvd_torch::{Hook, autograd, set_grad};
use tch::{Device, Kind, Tensor};

type Trace = Arc<Mutex<Vec<&'static str>>>;

fn leaf(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

fn traced(trace: &Trace, name: &'static str, param: &Tensor) -> Hook {
    let trace = trace.clone();
    Hook::after_accumulate(param, move || trace.lock().unwrap().push(name)).unwrap()
}

#[test]
fn fire_in_reverse_order_of_use_before_backward_returns() {
    let (a, b, c) = (leaf(&[2.0]), leaf(&[3.0]), leaf(&[4.0]));
    let trace = Trace::default();
    let _hooks = [traced(&trace, "a", &a), traced(&trace, "b", &b), traced(&trace, "c", &c)];
    (((&a * 2.0).sin() * &b).cos() * &c).backward();
    assert_eq!(*trace.lock().unwrap(), ["c", "b", "a"]);
}

#[test]
fn see_the_accumulated_gradient() {
    let a = leaf(&[2.0, 5.0]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (record, inside) = (seen.clone(), Mutex::new(a.shallow_clone()));
    let hook = move || record.lock().unwrap().push(values(&inside.lock().unwrap().grad()));
    let _hook = Hook::after_accumulate(&a, hook).unwrap();
    for _ in 0..2 {
        (&a * 3.0).sum(Kind::Double).backward();
    }
    assert_eq!(*seen.lock().unwrap(), [[3.0, 3.0], [6.0, 6.0]]);
}

#[test]
fn a_shared_parameter_fires_once_an_unused_one_never() {
    let (shared, unused) = (leaf(&[2.0]), leaf(&[2.0]));
    let trace = Trace::default();
    let _hooks = [traced(&trace, "shared", &shared), traced(&trace, "unused", &unused)];
    (&shared * &shared + shared.exp()).backward();
    assert_eq!(*trace.lock().unwrap(), ["shared"]);
    assert!(autograd::grad(&unused).unwrap().is_none());
}

#[test]
fn survive_copies_and_end_with_their_guard() {
    let mut a = leaf(&[2.0]);
    let trace = Trace::default();
    let hook = traced(&trace, "a", &a);
    tch::no_grad(|| a.copy_(&Tensor::from_slice(&[7.0])));
    (&a * 1.0).backward();
    assert_eq!(trace.lock().unwrap().len(), 1);
    drop(hook);
    (&a * 1.0).backward();
    assert_eq!(trace.lock().unwrap().len(), 1);
    assert_eq!(Arc::strong_count(&trace), 1, "the closure was dropped with the hook");
}

#[test]
fn a_second_hook_and_a_tensor_without_gradient_are_refused() {
    let a = leaf(&[2.0]);
    let owned = Arc::new(());
    let _hook = Hook::after_accumulate(&a, || ()).unwrap();
    let second = {
        let owned = owned.clone();
        Hook::after_accumulate(&a, move || _ = &owned).unwrap_err()
    };
    assert!(second.to_string().contains("already has a hook"), "{second}");
    assert_eq!(Arc::strong_count(&owned), 1, "the refused closure was dropped");
    let constant = Hook::after_accumulate(&Tensor::from_slice(&[1.0]), || ()).unwrap_err();
    assert!(constant.to_string().contains("requires a gradient"), "{constant}");
}

#[test]
fn a_panic_does_not_reach_cpp() {
    let a = leaf(&[2.0]);
    let count = Arc::new(AtomicUsize::new(0));
    let _hook = {
        let count = count.clone();
        Hook::after_accumulate(&a, move || {
            count.fetch_add(1, Ordering::Relaxed);
            panic!("a panic that the test wants");
        })
        .unwrap()
    };
    (&a * 3.0).backward();
    (&a * 3.0).backward();
    assert_eq!(count.load(Ordering::Relaxed), 2);
    assert_eq!(values(&a.grad()), [6.0]);
}

#[test]
fn backward_accumulates_into_a_gradient_that_was_set() {
    let a = leaf(&[2.0, 3.0]);
    let flat = Tensor::zeros([4], (Kind::Double, Device::Cpu));
    set_grad(&a, Some(&flat.narrow(0, 1, 2))).unwrap();
    (&a * &a).sum(Kind::Double).backward();
    assert_eq!(values(&flat), [0.0, 4.0, 6.0, 0.0]);
    set_grad(&a, None).unwrap();
    assert!(autograd::grad(&a).unwrap().is_none());
    let error = set_grad(&a, Some(&flat)).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}

#[test]
fn a_function_can_add_to_a_gradient_itself() {
    let (a, b) = (leaf(&[2.0, 3.0]), leaf(&[5.0, 7.0]));
    let trace = Trace::default();
    let _hooks = [traced(&trace, "a", &a), traced(&trace, "b", &b)];
    let run = || {
        let product = tch::no_grad(|| &a * &b);
        let kept = [a.shallow_clone(), b.shallow_clone()];
        let backward = move |grads: &[Tensor]| {
            let [a, b] = &kept;
            autograd::accumulate(a, |grad, onto| onto.add(&grad, &(&grads[0] * b)))?;
            Ok(vec![Tensor::new(), &grads[0] * a])
        };
        autograd::differentiate(&[&a, &b], std::slice::from_ref(&product), backward).unwrap();
        // Used once more, by a function of torch's: the hook waits for both.
        (product.sum(Kind::Double) + (&a * 100.0).sum(Kind::Double)).backward();
    };
    run();
    assert_eq!((values(&a.grad()), values(&b.grad())), (vec![105.0, 107.0], vec![2.0, 3.0]));
    assert_eq!(trace.lock().unwrap().len(), 2);
    let address = a.grad().data_ptr();
    run();
    assert_eq!((values(&a.grad()), a.grad().data_ptr()), (vec![210.0, 214.0], address));
    assert_eq!(trace.lock().unwrap().len(), 4);
}

#[test]
fn backward_from_the_middle() {
    let a = leaf(&[2.0, 3.0]);
    let middle = &a * 5.0;
    let outside = Tensor::from_slice(&[1.0, 10.0]);
    autograd::backward(&[(&middle, Some(&outside))], false).unwrap();
    assert_eq!(values(&a.grad()), [5.0, 50.0]);
    let error = autograd::backward(&[(&(&a * 5.0), None)], false).unwrap_err();
    assert!(error.to_string().contains("scalar"), "{error}");
}
