//! A bucket: one flat tensor whose parts are the gradients of some parameters.

use std::ffi::c_void;

use hvd_core::World;
use tch::Tensor;

use super::plan::BucketPlan;
use crate::autograd::Hook;
use crate::error::Result;
use crate::memory;
use crate::ops::TensorHandle;
use crate::shim;

/// A parameter of a bucket.
#[derive(Debug)]
pub(super) struct Member {
    pub name: String,
    param: Tensor,
    /// The parameter's part of the flat tensor, in the parameter's shape.
    view: Tensor,
    /// The view's address, by which we see whether it still is the parameter's gradient.
    address: *mut c_void,
    /// Backward passes that have reached the parameter since the last step.
    pub fired: usize,
}

// SAFETY: the address is compared, never followed.
unsafe impl Send for Member {}

/// Gradients that are reduced together.
#[derive(Debug)]
pub(super) struct Bucket {
    /// The name of its reduction, the same on all ranks.
    pub name: String,
    pub flat: Tensor,
    pub members: Vec<Member>,
    /// Members whose gradient is not complete.
    pub waiting: usize,
    /// Whether the reduction has begun since the last step.
    pub submitted: bool,
    /// The reduction that is under way.
    pub handle: Option<TensorHandle>,
}

impl Bucket {
    /// Makes the flat tensor, which the ranks of a host reduce in place if it is all ranks of `world` that do, and lets the
    /// parameters' gradients live in it.
    pub(super) fn new(
        name: String,
        plan: &BucketPlan,
        params: &[(String, Tensor)],
        world: Option<&World>,
    ) -> Result<Bucket> {
        let flat = memory::shared_zeros(world, plan.elements, plan.kind, plan.device)?;
        let member = |place: &super::plan::Place| {
            let (name, param) = &params[place.param];
            Member::new(name.clone(), param.shallow_clone(), &flat, place.offset)
        };
        let members = plan.places.iter().map(member).collect::<Result<Vec<_>>>()?;
        Ok(Bucket { name, waiting: members.len(), flat, members, submitted: false, handle: None })
    }

    /// Makes sure that all gradients lie in the flat tensor.
    pub(super) fn collect(&mut self) -> Result<()> {
        self.members.iter_mut().try_for_each(Member::collect)
    }

    /// Removes the parameters' gradients.
    pub(super) fn clear(&self) -> Result<()> {
        self.members.iter().try_for_each(|member| shim::grad_set(&member.param, None))
    }

    /// Counts anew.
    pub(super) fn begin(&mut self) {
        self.waiting = self.members.len();
        self.submitted = false;
        for member in &mut self.members {
            member.fired = 0;
        }
    }
}

impl Member {
    fn new(name: String, param: Tensor, flat: &Tensor, offset: usize) -> Result<Member> {
        let view = tch::no_grad(|| flat.f_narrow(0, offset as i64, param.numel() as i64)?.f_view(&*param.size()))?;
        let address = view.data_ptr();
        let mut member = Member { name, param, view, address, fired: 0 };
        member.collect()?;
        Hook::begin_in(&member.param, &member.view)?;
        Ok(member)
    }

    /// Makes sure that the gradient lies in the flat tensor. A gradient that lies elsewhere, because somebody replaced
    /// or removed it, is copied in; one that is missing counts as zero.
    pub(super) fn collect(&mut self) -> Result<()> {
        if shim::grad_data(&self.param)? == self.address {
            return Ok(());
        }
        tch::no_grad(|| -> Result<()> {
            match crate::autograd::grad(&self.param)? {
                Some(grad) if grad.is_sparse() => self.view.f_copy_(&grad.f_to_dense(None, false)?)?,
                Some(grad) => self.view.f_copy_(&grad)?,
                None => _ = self.view.f_zero_()?,
            }
            Ok(())
        })?;
        shim::grad_set(&self.param, Some(&self.view))
    }
}
