//! What the tests share: numbers without a random generator (which the ranks, being threads here, would share), a small
//! network, and a watchdog.
#![allow(dead_code)] // Each test uses a part.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hvd_torch::{AdamW, ParamGroup, World};
use tch::{Device, Kind, Tensor};

/// Runs `rank` on each of `size` ranks that are threads; they leave together.
pub fn ranks<R: Send>(size: usize, rank: impl Fn(World) -> R + Sync) -> Vec<R> {
    World::threads(size, |world| {
        let result = rank(world.clone());
        world.shutdown().unwrap();
        result
    })
}

/// As [`ranks`], with memory that the ranks share as the processes of one host do.
pub fn ranks_sharing<R: Send>(size: usize, rank: impl Fn(World) -> R + Sync) -> Vec<R> {
    World::threads_sharing(size, &Default::default(), |world| {
        let result = rank(world.clone());
        world.shutdown().unwrap();
        result
    })
}

/// Numbers in (-1, 1) that look random, the same for the same `seed`.
pub fn numbers(size: &[i64], kind: Kind, seed: i64) -> Tensor {
    let count: i64 = size.iter().product();
    let phase = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64 * 78.233;
    let noise: Tensor = phase.sin() * 43758.5453;
    ((noise.shallow_clone() - noise.floor()) * 2.0 - 1.0).view(size).to_kind(kind)
}

/// A two-layer network: names and parameters in the order of use.
pub struct Mlp {
    pub params: Vec<(String, Tensor)>,
}

impl Mlp {
    pub fn new(kind: Kind) -> Self {
        let param = |at: i64, size: &[i64]| numbers(size, kind, 100 + at).detach().set_requires_grad(true);
        let names = ["first.weight", "first.bias", "second.weight", "second.bias"];
        let sizes: [&[i64]; 4] = [&[16, 8], &[16], &[3, 16], &[3]];
        let params =
            names.iter().zip(sizes).enumerate().map(|(at, (name, size))| (name.to_string(), param(at as i64, size)));
        Mlp { params: params.collect() }
    }

    /// The mean squared error of a batch of inputs (B, 8).
    pub fn loss(&self, inputs: &Tensor) -> Tensor {
        let layer = |at: usize, x: &Tensor| x.linear(&self.params[at].1, Some(&self.params[at + 1].1));
        let targets = inputs.narrow(1, 0, 3).sin();
        (layer(2, &layer(0, inputs).tanh()) - targets).square().mean(Kind::Double)
    }

    pub fn shallow(&self) -> Vec<(String, Tensor)> {
        self.params.iter().map(|(name, param)| (name.clone(), param.shallow_clone())).collect()
    }

    pub fn gradients(&self) -> Vec<Tensor> {
        self.params.iter().map(|(_, param)| param.grad().copy()).collect()
    }
}

/// The largest difference of two tensors' elements.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 {
        return 0.0;
    }
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).contiguous().view([-1])).unwrap()
}

/// Runs a test that could hang; fails it after a minute.
pub fn watched(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    if wait.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
        panic!("the test hangs");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Worlds to try.
pub const SIZES: [usize; 3] = [1, 2, 3];

/// An AdamW with settings that show in a few steps.
pub fn adamw(params: Vec<(String, Tensor)>) -> AdamW {
    AdamW::new(vec![ParamGroup { params, lr: 1e-2, weight_decay: 0.1 }], (0.9, 0.95), 1e-8).unwrap()
}
