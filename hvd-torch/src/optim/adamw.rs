//! AdamW with torch's fused update.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::{Optimizer, check_unique};
use crate::autograd;
use crate::error::{Error, Result};
use crate::foreach;
use crate::shim::{AdamWConstants, AdamWLists};

/// Parameters that share their settings.
#[derive(Debug)]
pub struct ParamGroup {
    /// The parameters, with names that are unique over all groups.
    pub params: Vec<(String, Tensor)>,
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay: each update first shrinks the parameters by `lr * weight_decay` of themselves.
    pub weight_decay: f64,
}

/// A parameter and what AdamW remembers of it.
#[derive(Debug)]
struct Slot {
    name: String,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// An f32 scalar, as torch's kernel wants it; counts exactly up to 2^24 updates.
    step: Tensor,
}

#[derive(Debug)]
struct Group {
    slots: Vec<Slot>,
    lr: f64,
    weight_decay: f64,
}

/// AdamW (Loshchilov and Hutter, 2019), one fused pass over each parameter.
///
/// Takes f32, f64, bf16 and f16 parameters on any device; the moments have the parameter's type.
#[derive(Debug)]
pub struct AdamW {
    groups: Vec<Group>,
    betas: (f64, f64),
    eps: f64,
}

impl AdamW {
    /// An optimizer that has seen no gradient yet.
    ///
    /// # Errors
    /// If a name occurs twice, a parameter is not a contiguous leaf of floating type that requires a gradient, or a
    /// number is out of range.
    pub fn new(groups: Vec<ParamGroup>, betas: (f64, f64), eps: f64) -> Result<AdamW> {
        check_constants(betas, eps)?;
        let groups = groups.into_iter().map(Group::new).collect::<Result<Vec<_>>>()?;
        let adamw = AdamW { groups, betas, eps };
        let params = adamw.parameters();
        if params.is_empty() {
            return Err(Error::invalid("AdamW got no parameters"));
        }
        check_unique(&params)?;
        Ok(adamw)
    }

    /// Sets the learning rate of one group.
    ///
    /// # Panics
    /// If there is no group `group`.
    pub fn set_group_lr(&mut self, group: usize, lr: f64) {
        self.groups[group].lr = lr;
    }

    /// The learning rate of each group.
    pub fn lr(&self) -> Vec<f64> {
        self.groups.iter().map(|group| group.lr).collect()
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.groups.iter().flat_map(|group| &group.slots)
    }
}

fn check_constants(betas: (f64, f64), eps: f64) -> Result<()> {
    for beta in [betas.0, betas.1] {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::invalid(format!("AdamW's betas lie in [0, 1); got {beta}")));
        }
    }
    if !(eps >= 0.0 && eps.is_finite()) {
        return Err(Error::invalid(format!("AdamW's eps is not negative; got {eps}")));
    }
    Ok(())
}

impl Group {
    fn new(group: ParamGroup) -> Result<Group> {
        for (what, value) in [("learning rate", group.lr), ("weight decay", group.weight_decay)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::invalid(format!("AdamW's {what} is not negative; got {value}")));
            }
        }
        let slots = group.params.into_iter().map(|(name, param)| Slot::new(name, param)).collect::<Result<_>>()?;
        Ok(Group { slots, lr: group.lr, weight_decay: group.weight_decay })
    }

    /// Updates the parameters that have a gradient; one call for each combination of kind and device.
    fn step(&self, betas: (f64, f64), eps: f64) -> Result<()> {
        let constants = AdamWConstants { lr: self.lr, betas, weight_decay: self.weight_decay, eps };
        let mut alive = Vec::with_capacity(self.slots.len());
        let mut lists: Vec<((Kind, tch::Device), AdamWLists)> = Vec::new();
        for slot in &self.slots {
            let Some(grad) = autograd::grad(&slot.param)? else { continue };
            if grad.is_sparse() {
                return Err(Error::invalid(format!("AdamW cannot update `{}` from a sparse gradient", slot.name)));
            }
            let key = (slot.param.kind(), slot.param.device());
            let at = lists.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
                lists.push((key, AdamWLists::default()));
                lists.len() - 1
            });
            lists[at].1.push(&slot.param, &grad, [&slot.exp_avg, &slot.exp_avg_sq, &slot.step]);
            alive.push(grad);
        }
        // SAFETY: `self` and `alive` hold the tensors.
        lists.iter().try_for_each(|(_, list)| unsafe { list.update(&constants) })
    }
}

impl Slot {
    fn new(name: String, param: Tensor) -> Result<Slot> {
        let floating = matches!(param.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half);
        if !(floating && param.is_leaf() && param.requires_grad() && param.is_contiguous()) {
            return Err(Error::invalid(format!(
                "AdamW updates contiguous floating leaves that require a gradient; `{name}` is {param:?} \
                 (leaf: {}, requires_grad: {}, contiguous: {})",
                param.is_leaf(),
                param.requires_grad(),
                param.is_contiguous(),
            )));
        }
        tch::no_grad(|| {
            let exp_avg = param.f_zeros_like()?;
            let exp_avg_sq = param.f_zeros_like()?;
            let step = Tensor::f_zeros([0i64; 0], (Kind::Float, param.device()))?;
            Ok(Slot { name, param, exp_avg, exp_avg_sq, step })
        })
    }

    fn state(&self) -> [(String, Tensor); 3] {
        [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq), ("step", &self.step)]
            .map(|(what, tensor)| (format!("{what}.{}", self.name), tensor.shallow_clone()))
    }
}

impl Optimizer for AdamW {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.slots().map(|slot| (slot.name.clone(), slot.param.shallow_clone())).collect()
    }

    fn step(&mut self) -> Result<()> {
        self.groups.iter().try_for_each(|group| group.step(self.betas, self.eps))
    }

    fn zero_grad(&mut self) -> Result<()> {
        let mut grads = Vec::new();
        for slot in self.slots() {
            grads.extend(autograd::grad(&slot.param)?);
        }
        foreach::zero_(&grads)
    }

    fn set_lr(&mut self, lr: f64) {
        for group in &mut self.groups {
            group.lr = lr;
        }
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.slots().flat_map(Slot::state).collect())
    }

    fn check_state(&self, state: &[(String, Tensor)]) -> Result<()> {
        match_state(&self.state()?, state).map(drop)
    }

    fn load_state(&mut self, state: &[(String, Tensor)]) -> Result<()> {
        let own = self.state()?;
        let pairs = match_state(&own, state)?;
        tch::no_grad(|| {
            for (mut own, new) in pairs {
                own.f_copy_(new)?;
            }
            Ok(())
        })
    }
}

/// Pairs each tensor of `own` with the one of the same name in `state`.
fn match_state<'a>(own: &[(String, Tensor)], state: &'a [(String, Tensor)]) -> Result<Vec<(Tensor, &'a Tensor)>> {
    let mut given: HashMap<&str, &Tensor> = HashMap::new();
    for (name, tensor) in state {
        if given.insert(name, tensor).is_some() {
            return Err(Error::invalid(format!("the optimizer's state has `{name}` twice")));
        }
    }
    let mut pairs = Vec::with_capacity(own.len());
    for (name, tensor) in own {
        let Some(new) = given.remove(name.as_str()) else {
            return Err(Error::invalid(format!("the optimizer's state lacks `{name}`; is it another model's?")));
        };
        if new.size() != tensor.size() || new.kind() != tensor.kind() {
            return Err(Error::invalid(format!(
                "`{name}` in the optimizer's state is {new:?}, but this model needs {tensor:?}"
            )));
        }
        pairs.push((tensor.shallow_clone(), new));
    }
    match given.keys().min() {
        Some(name) => Err(Error::invalid(format!("the optimizer's state has `{name}`, which this model lacks"))),
        None => Ok(pairs),
    }
}
