//! Makes parameters and keeps the list of them.

use tch::{Tensor, nn};

use super::random;

/// Draws a model's first weights. A weight depends on the seed, its name and its shape: not on the device, the element
/// type (each is drawn in f32 and then converted) or the order in which parameters are made.
pub(super) struct Init {
    /// Without one every weight is 0: they will be read from a file.
    seed: Option<u64>,
    /// All parameters so far, in the order they were made.
    pub(super) parameters: Vec<(String, Tensor)>,
}

impl Init {
    pub(super) fn new(seed: Option<u64>) -> Self {
        Self { seed, parameters: Vec::new() }
    }

    pub(super) fn normal(&mut self, path: &nn::Path, name: &str, shape: &[usize], std: f64) -> Tensor {
        match self.seed {
            Some(seed) => {
                let values = random::normal(seed, &path.path(name), shape.iter().product(), std);
                self.add(path, name, shape, &values)
            }
            None => self.constant(path, name, shape, 0.0),
        }
    }

    pub(super) fn constant(&mut self, path: &nn::Path, name: &str, shape: &[usize], value: f32) -> Tensor {
        self.add(path, name, shape, &vec![value; shape.iter().product()])
    }

    fn add(&mut self, path: &nn::Path, name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let tensor = Tensor::from_slice(values).view(&shape[..]).to_kind(path.kind()).to_device(path.device());
        let tensor = path.add(name, tensor, true);
        self.parameters.push((path.path(name), tensor.shallow_clone()));
        tensor
    }
}
