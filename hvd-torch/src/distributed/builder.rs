//! The settings of a distributed optimizer.

use std::sync::Arc;

use hvd_core::{Allreduce, Compression, ReduceOp, World, world};
use tch::Tensor;

use super::DistributedOptimizer;
use super::bucket::Bucket;
use super::plan::{Limits, Shape, plan};
use super::state::{OnGradient, Shared, State};
use crate::autograd::Hook;
use crate::error::{Error, Result};
use crate::optim::{Optimizer, check_unique};
use crate::random::mix;

/// Bytes of gradients that travel together, unless set.
const BUCKET_BYTES: usize = 25 << 20;
/// The first bucket is smaller, so that the wire is busy early.
const FIRST_BUCKET_BYTES: usize = 1 << 20;

/// Settings of a [`DistributedOptimizer`]. All ranks must use the same.
#[must_use = "a builder does nothing until `build`"]
pub struct Builder<O: Optimizer> {
    optimizer: O,
    world: Option<World>,
    name: String,
    passes: usize,
    compression: Compression,
    op: ReduceOp,
    bucket_bytes: usize,
    on_gradient: Option<OnGradient>,
}

impl<O: Optimizer> Builder<O> {
    pub(super) fn new(optimizer: O) -> Self {
        Builder {
            optimizer,
            world: None,
            name: "optimizer".into(),
            passes: 1,
            compression: Compression::None,
            op: ReduceOp::Average,
            bucket_bytes: BUCKET_BYTES,
            on_gradient: None,
        }
    }

    /// The world to reduce in; by default the global one, from [`crate::init`].
    pub fn world(mut self, world: World) -> Self {
        self.world = Some(world);
        self
    }

    /// What the names of the reductions begin with, `optimizer` by default. Several optimizers need several names.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// After how many backward passes gradients are complete, 1 by default. They are summed, not averaged, over passes.
    pub fn backward_passes_per_step(mut self, passes: usize) -> Self {
        self.passes = passes;
        self
    }

    /// What f32 and f64 gradients are narrowed to while they travel; by default nothing.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// [`ReduceOp::Average`], the default, or [`ReduceOp::Sum`].
    pub fn op(mut self, op: ReduceOp) -> Self {
        self.op = op;
        self
    }

    /// How many bytes of gradients travel together, 25 MiB by default. The first bucket has at most 1 MiB.
    pub fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.bucket_bytes = bytes;
        self
    }

    /// Calls `callback` with a parameter's name each time that backward has reached it, before anything is submitted;
    /// for traces and tests. Runs inside of backward.
    pub fn on_gradient(mut self, callback: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.on_gradient = Some(Box::new(callback));
        self
    }

    /// Makes the buckets, moves existing gradients into them and attaches the hooks. All ranks must call it.
    ///
    /// # Errors
    /// If a setting makes no sense, a parameter already belongs to a distributed optimizer, names occur twice, the ranks'
    /// parameters or settings differ, or the global world is wanted before `init`.
    pub fn build(self) -> Result<DistributedOptimizer<O>> {
        self.check()?;
        let params = self.optimizer.parameters();
        check_unique(&params)?;
        let world = match self.world.clone() {
            Some(world) => world,
            None => world()?,
        };
        let limits = Limits { first_bytes: FIRST_BUCKET_BYTES, bytes: self.bucket_bytes };
        let shapes: Vec<_> = params.iter().map(|(_, param)| Shape::of(param)).collect();
        let plans = plan(&shapes, limits);
        agree(&world, &self.name, self.digest(&params))?;

        // The hooks first: they tell whether the parameters are free, before any gradient is moved.
        let reduction = Allreduce::new(self.op).compression(self.compression);
        let (buckets, passes) = (Vec::new(), self.passes);
        let state = State { world: world.clone(), reduction, buckets, passes, synchronized: false, failure: None };
        let shared = Arc::new(Shared::new(state, self.on_gradient));
        let mut hooks = Vec::with_capacity(params.len());
        for (at, plan) in plans.iter().enumerate() {
            for (member, place) in plan.places.iter().enumerate() {
                hooks.push(attach(&shared, &params[place.param], at, member)?);
            }
        }
        let bucket = |(at, plan)| Bucket::new(format!("{}.bucket.{at}", self.name), plan, &params, &world);
        let buckets = plans.iter().enumerate().map(bucket).collect::<Result<Vec<_>>>()?;
        shared.lock().buckets = buckets;
        Ok(DistributedOptimizer { optimizer: self.optimizer, shared, _hooks: hooks })
    }

    /// A number that differs where parameters, their order, or settings do.
    fn digest(&self, params: &[(String, Tensor)]) -> u64 {
        let settings = format!("{:?} {:?} {} {}", self.compression, self.op, self.bucket_bytes, self.passes);
        let param = |(name, param): &(String, Tensor)| format!("{name} {:?} {:?}", param.kind(), param.size());
        let texts = std::iter::once(settings).chain(params.iter().map(param));
        texts.fold(0, |digest, text| mix(&[digest, text.len() as u64, mix_bytes(text.as_bytes())]))
    }

    fn check(&self) -> Result<()> {
        if self.passes == 0 {
            return Err(Error::invalid("backward_passes_per_step must be at least 1"));
        }
        if self.bucket_bytes == 0 {
            return Err(Error::invalid("bucket_bytes must be at least 1"));
        }
        if !matches!(self.op, ReduceOp::Average | ReduceOp::Sum) {
            return Err(Error::invalid(format!("gradients are averaged or summed over ranks, not {:?}", self.op)));
        }
        Ok(())
    }
}

fn mix_bytes(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |digest, byte| mix(&[digest, u64::from(*byte)]))
}

/// Refuses a world whose ranks are about to reduce different things under the same names. Buckets of the same size would
/// mix up gradients without anybody noticing.
fn agree(world: &World, name: &str, digest: u64) -> Result<()> {
    if world.size() == 1 {
        return Ok(());
    }
    let digests = world.allgather(&format!("{name}.plan"), &[digest as i64])?;
    match digests.iter().position(|other| *other != digests[0]) {
        None => Ok(()),
        Some(rank) => Err(Error::invalid(format!(
            "rank {rank} wraps other parameters, in another order or with other settings, than rank 0. All ranks must give \
             the same ones in the same order; a HashMap, such as VarStore::variables() returns, has no order: use \
             named_parameters()"
        ))),
    }
}

/// Hooks a parameter. The hook holds no strong reference: the parameter owns the hook, and the buckets the parameter.
fn attach(shared: &Arc<Shared>, (name, param): &(String, Tensor), bucket: usize, member: usize) -> Result<Hook> {
    let shared = Arc::downgrade(shared);
    let hook = Hook::after_accumulate(param, move || {
        if let Some(shared) = shared.upgrade() {
            shared.fired(bucket, member);
        }
    });
    hook.map_err(|error| match error {
        Error::Torch(reason) if reason.contains("already has a hook") => Error::invalid(format!(
            "the parameter `{name}` already belongs to a DistributedOptimizer, or is listed twice; drop the other first"
        )),
        error => error,
    })
}
