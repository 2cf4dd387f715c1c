//! AdamW whose moments are spread over the ranks.

use hvd_core::World;
use tch::{Kind, Tensor};

use super::{AdamW, Optimizer, ParamGroup};
use crate::error::{Error, Result};
use crate::ops;

/// Names of what AdamW remembers of a parameter, in the order of [`AdamW`]'s state.
const STATE: [&str; 3] = ["exp_avg", "exp_avg_sq", "step"];

/// [`AdamW`], with each parameter's moments on one rank only, which updates it and hands it to the others: stage 1 of ZeRO
/// (Rajbhandari et al., 2020). With n ranks the moments, twice the size of the parameters, take 1/n of the memory, and the
/// results have the same bits.
///
/// [`Optimizer::step`], [`Optimizer::state`] and [`Optimizer::load_state`] are collective: every rank must call them. Rank
/// 0 gets the whole state, and gives it; on the other ranks `state` is empty and what is given to `load_state` is ignored.
#[derive(Debug)]
pub struct ShardedAdamW {
    world: World,
    /// Of the parameters that this rank owns; none where there are more ranks than parameters.
    own: Option<AdamW>,
    parameters: Vec<(String, Tensor)>,
    /// Each parameter's rank.
    owners: Vec<usize>,
}

impl ShardedAdamW {
    /// An optimizer that has seen no gradient yet. All ranks must give the same parameters in the same order.
    ///
    /// # Errors
    /// As [`AdamW::new`].
    pub fn new(world: World, groups: Vec<ParamGroup>, betas: (f64, f64), eps: f64) -> Result<ShardedAdamW> {
        let shallow = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        let parameters: Vec<_> = groups.iter().flat_map(|group| group.params.iter().map(shallow)).collect();
        super::check_unique(&parameters)?;
        let owners = deal(&parameters, world.size());
        let mut at = 0..parameters.len();
        let mut is_own = |_: &(String, Tensor)| at.next().is_some_and(|index| owners[index] == world.rank());
        let own: Vec<_> = groups
            .into_iter()
            .map(|group| ParamGroup { params: group.params.into_iter().filter(&mut is_own).collect(), ..group })
            .filter(|group| !group.params.is_empty())
            .collect();
        let own = if own.is_empty() { None } else { Some(AdamW::new(own, betas, eps)?) };
        Ok(ShardedAdamW { world, own, parameters, owners })
    }

    /// Calls `visit(name, tensor)` for every state tensor of every parameter, in the same order on all ranks, after
    /// `source(owner)` has handed it out. The owner sees its own tensor, the others a copy that is dropped afterwards.
    fn pass_around(
        &self,
        given: &[(String, Tensor)],
        source: impl Fn(usize) -> usize,
        mut visit: impl FnMut(&str, Tensor),
    ) -> Result<()> {
        let own = self.own.as_ref().map_or(Ok(Vec::new()), AdamW::state)?;
        for ((parameter, tensor), &owner) in self.parameters.iter().zip(&self.owners) {
            for what in STATE {
                let name = format!("{what}.{parameter}");
                let found = own.iter().chain(given).find(|(other, _)| *other == name);
                let blank = || match what {
                    "step" => Tensor::f_zeros([0i64; 0], (Kind::Float, tensor.device())),
                    _ => tch::no_grad(|| tensor.f_zeros_like()),
                };
                let shared = found.map_or_else(blank, |(_, tensor)| Ok(tensor.shallow_clone()))?;
                ops::broadcast_(&self.world, &shared, &format!("sharded.{name}"), source(owner))?;
                visit(&name, shared);
            }
        }
        Ok(())
    }
}

/// Gives each parameter to the rank that has least so far, the largest first. A pure function of the sizes.
fn deal(parameters: &[(String, Tensor)], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..parameters.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(parameters[index].1.numel()));
    let (mut load, mut owners) = (vec![0; ranks], vec![0; parameters.len()]);
    for index in order {
        let rank = (0..ranks).min_by_key(|&rank| load[rank]).unwrap_or(0);
        load[rank] += parameters[index].1.numel();
        owners[index] = rank;
    }
    owners
}

impl Optimizer for ShardedAdamW {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    fn step(&mut self) -> Result<()> {
        if let Some(own) = &mut self.own {
            own.step()?;
        }
        let hand_out = |((name, tensor), &owner): (&(String, Tensor), &usize)| {
            ops::broadcast_async_(&self.world, tensor, &format!("sharded.{name}"), owner)
        };
        let under_way = self.parameters.iter().zip(&self.owners).map(hand_out).collect::<Result<Vec<_>>>()?;
        // Wait for all, also after an error, so that nothing still writes to the tensors when this returns.
        under_way.into_iter().map(|handle| handle.wait().map(drop)).fold(Ok(()), Result::and)
    }

    fn zero_grad(&mut self) -> Result<()> {
        let grads = self.parameters.iter().map(|(_, tensor)| crate::autograd::grad(tensor));
        let grads = grads.collect::<Result<Vec<_>>>()?;
        crate::foreach::zero_(&grads.into_iter().flatten().collect::<Vec<_>>())
    }

    fn set_lr(&mut self, lr: f64) {
        if let Some(own) = &mut self.own {
            own.set_lr(lr);
        }
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut whole = Vec::new();
        self.pass_around(
            &[],
            |owner| owner,
            |name, tensor| {
                if self.world.rank() == 0 {
                    whole.push((name.to_string(), tensor));
                }
            },
        )?;
        Ok(whole)
    }

    /// Of the whole state, which rank 0 has.
    fn check_state(&self, state: &[(String, Tensor)]) -> Result<()> {
        for (parameter, tensor) in &self.parameters {
            for what in STATE {
                let name = format!("{what}.{parameter}");
                let (size, kind) = match what {
                    "step" => (Vec::new(), Kind::Float),
                    _ => (tensor.size(), tensor.kind()),
                };
                let fits = |(other, found): &(String, Tensor)| {
                    *other == name && (found.size(), found.kind()) == (size.clone(), kind)
                };
                if !state.iter().any(fits) {
                    return Err(Error::invalid(format!("the optimizer's state lacks `{name}` of {kind:?} {size:?}")));
                }
            }
        }
        match state.len() == STATE.len() * self.parameters.len() {
            true => Ok(()),
            false => Err(Error::invalid("the optimizer's state has tensors of parameters that this model lacks")),
        }
    }

    fn load_state(&mut self, state: &[(String, Tensor)]) -> Result<()> {
        if self.world.rank() == 0 {
            self.check_state(state)?;
            // What rank 0 owns it keeps under the same names: it must send what was given instead.
            let own = self.own.as_ref().map_or(Ok(Vec::new()), AdamW::state)?;
            for (name, mut tensor) in own {
                if let Some((_, given)) = state.iter().find(|(other, _)| *other == name) {
                    tch::no_grad(|| tensor.f_copy_(given))?;
                }
            }
        }
        self.pass_around(state, |_| 0, |_, _| ())
    }
}
