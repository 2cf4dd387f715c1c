//! Mixed precision on CPU and CUDA.

use std::marker::PhantomData;

use tch::{Device, Kind};

use crate::error::{Error, Result};
use crate::shim;

/// Autocast for the calling thread, for as long as this value lives.
///
/// Operations that gain from it (matrix products, attention) run in the lower precision; those that need range
/// (softmax, losses) in f32. The casts of weights are cached until the outermost guard goes, so one guard should cover a
/// forward pass, and no more: leave it before `backward`.
#[must_use = "autocast ends when this value is dropped"]
#[derive(Debug)]
pub struct Autocast {
    cuda: bool,
    before: shim::AutocastState,
    /// The state belongs to the thread.
    _not_send: PhantomData<*const ()>,
}

impl Autocast {
    /// Turns autocast to `kind` ([`Kind::BFloat16`] or [`Kind::Half`]) on for operations on `device`.
    ///
    /// # Errors
    /// For another kind or device.
    pub fn enter(device: Device, kind: Kind) -> Result<Autocast> {
        let Some(cuda) = is_cuda(device) else {
            return Err(Error::invalid(format!("autocast knows CPU and CUDA, not {device:?}")));
        };
        let Some((_, dtype)) = SCALAR_TYPES.into_iter().find(|(known, _)| *known == kind) else {
            return Err(Error::invalid(format!("autocast goes to BFloat16 or Half, not {kind:?}")));
        };
        Ok(Autocast { cuda, before: shim::autocast_enter(cuda, dtype)?, _not_send: PhantomData })
    }

    /// What operations on `device` are cast to, on the calling thread; none where they are not.
    pub fn kind(device: Device) -> Option<Kind> {
        let dtype = shim::autocast_dtype(is_cuda(device)?);
        SCALAR_TYPES.into_iter().find(|(_, known)| *known == dtype).map(|(kind, _)| kind)
    }
}

/// What autocast goes to, and its `c10::ScalarType`.
const SCALAR_TYPES: [(Kind, i32); 2] = [(Kind::Half, 5), (Kind::BFloat16, 15)];

/// Whether it is CUDA, of the devices that autocast knows.
fn is_cuda(device: Device) -> Option<bool> {
    match device {
        Device::Cpu => Some(false),
        Device::Cuda(_) => Some(true),
        _ => None,
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        if let Err(error) = shim::autocast_exit(self.cuda, &self.before) {
            tracing::error!("leaving autocast: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    fn product_kind() -> Kind {
        let a = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        a.matmul(&a).kind()
    }

    #[test]
    fn nests_and_ends() {
        assert_eq!((product_kind(), Autocast::kind(Device::Cpu)), (Kind::Float, None));
        {
            let _outer = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
            assert_eq!((product_kind(), Autocast::kind(Device::Cpu)), (Kind::BFloat16, Some(Kind::BFloat16)));
            {
                let _inner = Autocast::enter(Device::Cpu, Kind::Half).unwrap();
                assert_eq!(product_kind(), Kind::Half);
            }
            assert_eq!(product_kind(), Kind::BFloat16);
        }
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn gradients_come_in_the_weights_type() {
        let weight = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let loss = {
            let _autocast = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
            weight.matmul(&weight).sum(Kind::Float)
        };
        loss.backward();
        assert_eq!(weight.grad().kind(), Kind::Float);
        assert_eq!(weight.grad().double_value(&[0, 0]), 8.0);
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let error = Autocast::enter(Device::Cpu, Kind::Double).unwrap_err();
        assert!(error.to_string().contains("not Double"), "{error}");
    }
}
