//! The settings of a distributed optimizer.

use std::sync::Arc;

use hvd_core::{Allreduce, Compression, ProcessSet, ReduceOp, World, world};
use tch::Tensor;

use super::DistributedOptimizer;
use super::bucket::Bucket;
use super::plan::{self, Limits, Shape, plan};
use super::sparse::SparseGradient;
use super::state::{OnGradient, Place, Shared, State};
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
    ranks: Ranks,
    name: String,
    passes: usize,
    compression: Compression,
    op: ReduceOp,
    predivide_factor: f64,
    bucket_bytes: usize,
    groups: Groups,
    sparse: Vec<String>,
    sparse_as_dense: bool,
    on_gradient: Option<OnGradient>,
}

/// Names and tensors.
type Params = Vec<(String, Tensor)>;

/// Who reduces.
#[derive(Clone)]
enum Ranks {
    Global,
    World(World),
    Set(ProcessSet),
}

/// Which gradients are reduced as one.
enum Groups {
    /// As it suits.
    Any,
    /// So many groups of parameters in their order.
    Number(usize),
    /// These, by name; the others as it suits.
    Named(Vec<Vec<String>>),
}

impl Groups {
    /// Whether the parameter `name` was put in a group by its name.
    fn names(&self, name: &String) -> bool {
        matches!(self, Groups::Named(named) if named.iter().flatten().any(|other| other == name))
    }

    /// The group of each parameter.
    fn of(&self, params: &[(String, Tensor)]) -> Result<Vec<Option<usize>>> {
        let mut groups = vec![None; params.len()];
        match self {
            Groups::Any => {}
            Groups::Number(number) => {
                let chunks = hvd_core::collective::even_chunks(params.len(), *number);
                let places =
                    chunks.into_iter().enumerate().flat_map(|(group, places)| places.map(move |at| (at, group)));
                places.for_each(|(at, group)| groups[at] = Some(group));
            }
            Groups::Named(named) => {
                for (group, name) in
                    named.iter().enumerate().flat_map(|(at, names)| names.iter().map(move |it| (at, it)))
                {
                    let Some(at) = params.iter().position(|(param, _)| param == name) else {
                        return Err(Error::invalid(format!("`{name}` of a group is no parameter of the optimizer")));
                    };
                    if groups[at].replace(group).is_some() {
                        return Err(Error::invalid(format!("`{name}` occurs twice in the groups")));
                    }
                }
            }
        }
        Ok(groups)
    }
}

impl<O: Optimizer> Builder<O> {
    pub(super) fn new(optimizer: O) -> Self {
        Builder {
            optimizer,
            ranks: Ranks::Global,
            name: "optimizer".into(),
            passes: 1,
            compression: Compression::None,
            op: ReduceOp::Average,
            predivide_factor: 1.0,
            bucket_bytes: BUCKET_BYTES,
            groups: Groups::Any,
            sparse: Vec::new(),
            sparse_as_dense: false,
            on_gradient: None,
        }
    }

    /// The world to reduce in; by default the global one, from [`crate::init`].
    pub fn world(mut self, world: World) -> Self {
        self.ranks = Ranks::World(world);
        self
    }

    /// The ranks to reduce among, instead of a whole world.
    pub fn process_set(mut self, set: &ProcessSet) -> Self {
        self.ranks = Ranks::Set(set.clone());
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

    /// [`ReduceOp::Average`], the default, or [`ReduceOp::Sum`]; or [`ReduceOp::Adasum`]: each rank updates by its own
    /// gradients, and what the updates changed is combined, parameter by parameter.
    pub fn op(mut self, op: ReduceOp) -> Self {
        self.op = op;
        self
    }

    /// Divides the average in two steps: gradients are divided by `factor` before they are summed, and the sum by the number
    /// of ranks over `factor`. For an average only; 1, all afterwards, by default.
    pub fn gradient_predivide_factor(mut self, factor: f64) -> Self {
        self.predivide_factor = factor;
        self
    }

    /// Reduces the gradients of the named parameters of each list as one, whatever its size: one bucket for each kind of
    /// element. The others share buckets as ever.
    pub fn groups<S: Into<String>>(mut self, groups: impl IntoIterator<Item = Vec<S>>) -> Self {
        let named = |names: Vec<S>| names.into_iter().map(Into::into).collect();
        self.groups = Groups::Named(groups.into_iter().map(named).collect());
        self
    }

    /// Splits the parameters, in their order, into so many groups that are reduced as one each; see [`Builder::groups`].
    pub fn num_groups(mut self, number: usize) -> Self {
        self.groups = Groups::Number(number);
        self
    }

    /// Declares parameters whose gradients are sparse, as those of `Tensor::embedding(.., sparse = true)`. They stay sparse: each
    /// rank sends the rows that it has, as indices and values, uncompressed, and the optimizer gets the rows that any rank
    /// has. A rank that did not use the parameter sends none. Gradients of parameters that are not declared are dense, also
    /// where backward makes sparse ones.
    ///
    /// It pays where a batch touches few rows, as each rank receives the rows of all. The optimizer must take sparse gradients
    /// ([`Optimizer::takes_sparse`]), as tch's SGD does without weight decay.
    pub fn sparse<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.sparse = names.into_iter().map(Into::into).collect();
        self
    }

    /// Makes the gradients dense that were declared [`sparse`](Builder::sparse), too, and reduces them in buckets. `false` by
    /// default.
    pub fn sparse_as_dense(mut self, dense: bool) -> Self {
        self.sparse_as_dense = dense;
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
        let (sparse, params) = self.split(params)?;
        // Memory that ranks share belongs to a whole world.
        let (set, whole) = match self.ranks.clone() {
            Ranks::Global => world().map(|world| (ProcessSet::clone(&world), Some(world)))?,
            Ranks::World(world) => (ProcessSet::clone(&world), Some(world)),
            Ranks::Set(set) => (set, None),
        };
        let limits = Limits { first_bytes: FIRST_BUCKET_BYTES, bytes: self.bucket_bytes };
        let groups = self.groups.of(&params)?;
        let shapes: Vec<_> = params.iter().zip(&groups).map(|((_, param), group)| Shape::of(param, *group)).collect();
        let plans = plan(&shapes, limits);
        agree(&set, &self.name, self.digest(&sparse, &params, &groups))?;

        // The hooks first: they tell whether the parameters are free, before any gradient is moved.
        let factor = self.predivide_factor;
        let reduction = Allreduce::new(self.op).compression(self.compression).prescale(1.0 / factor).postscale(factor);
        let own = |(name, param): &(String, Tensor)| SparseGradient::new(&self.name, name, param);
        let gradients = sparse.iter().map(own).collect::<Result<_>>()?;
        let (buckets, passes) = (Vec::new(), self.passes);
        let state = State { set, reduction, buckets, sparse: gradients, passes, synchronized: false, failure: None };
        let shared = Arc::new(Shared::new(state, self.on_gradient));
        let dense = plans.iter().enumerate().flat_map(|(bucket, plan)| {
            let place = move |(member, place): (usize, &plan::Place)| (place.param, Place::Bucket { bucket, member });
            plan.places.iter().enumerate().map(place)
        });
        let dense = dense.map(|(param, place)| (&params[param], place));
        let places = dense.chain(sparse.iter().enumerate().map(|(at, param)| (param, Place::Sparse(at))));
        let hooks = places.map(|(param, place)| attach(&shared, param, place)).collect::<Result<_>>()?;
        let bucket = |(at, plan)| Bucket::new(format!("{}.bucket.{at}", self.name), plan, &params, whole.as_ref());
        let buckets = plans.iter().enumerate().map(bucket).collect::<Result<Vec<_>>>()?;
        shared.lock().buckets = buckets;
        Ok(DistributedOptimizer { optimizer: self.optimizer, name: self.name, shared, skips: false, _hooks: hooks })
    }

    /// The parameters whose gradients stay sparse, and the others.
    fn split(&self, params: Params) -> Result<(Params, Params)> {
        if let Some(name) = self.sparse.iter().find(|name| !params.iter().any(|(param, _)| param == *name)) {
            return Err(Error::invalid(format!("`{name}`, declared sparse, is no parameter of the optimizer")));
        }
        if self.sparse_as_dense {
            return Ok((Vec::new(), params));
        }
        if let Some(name) = self.sparse.iter().find(|name| self.groups.names(name)) {
            return Err(Error::invalid(format!("`{name}` is declared sparse, so it cannot be reduced in a group")));
        }
        match self.sparse.first() {
            Some(name) if !self.optimizer.takes_sparse() => Err(Error::invalid(format!(
                "`{name}` is declared sparse, but the optimizer cannot update from sparse gradients. Build with \
                 sparse_as_dense(true), or use one that can, such as tch's SGD"
            ))),
            _ => Ok(params.into_iter().partition(|(name, _)| self.sparse.contains(name))),
        }
    }

    /// A number that differs where parameters, their order, or settings do.
    fn digest(&self, sparse: &Params, params: &Params, groups: &[Option<usize>]) -> u64 {
        let Builder { compression, op, predivide_factor, bucket_bytes, passes, .. } = self;
        let settings =
            format!("{compression:?} {op:?} {predivide_factor} {bucket_bytes} {passes} {groups:?} {}", sparse.len());
        let param = |(name, param): &(String, Tensor)| format!("{name} {:?} {:?}", param.kind(), param.size());
        let texts = std::iter::once(settings).chain(sparse.iter().chain(params).map(param));
        texts.fold(0, |digest, text| mix(&[digest, text.len() as u64, mix_bytes(text.as_bytes())]))
    }

    fn check(&self) -> Result<()> {
        if self.passes == 0 {
            return Err(Error::invalid("backward_passes_per_step must be at least 1"));
        }
        if self.bucket_bytes == 0 {
            return Err(Error::invalid("bucket_bytes must be at least 1"));
        }
        if !matches!(self.op, ReduceOp::Average | ReduceOp::Sum | ReduceOp::Adasum) {
            return Err(Error::invalid(format!("gradients are averaged or summed over ranks, not {:?}", self.op)));
        }
        let factor = self.predivide_factor;
        if !factor.is_finite() || factor <= 0.0 || (factor != 1.0 && self.op != ReduceOp::Average) {
            return Err(Error::invalid(format!(
                "gradient_predivide_factor is {factor} with {:?}; it must be positive, and goes with Average alone",
                self.op
            )));
        }
        if matches!(self.groups, Groups::Number(0)) {
            return Err(Error::invalid("num_groups must be at least 1"));
        }
        Ok(())
    }
}

fn mix_bytes(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |digest, byte| mix(&[digest, u64::from(*byte)]))
}

/// Refuses a world whose ranks are about to reduce different things under the same names. Buckets of the same size would
/// mix up gradients without anybody noticing.
fn agree(set: &ProcessSet, name: &str, digest: u64) -> Result<()> {
    if set.size() == 1 {
        return Ok(());
    }
    let digests = set.allgather(&format!("{name}.plan"), &[digest as i64])?;
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
fn attach(shared: &Arc<Shared>, (name, param): &(String, Tensor), place: Place) -> Result<Hook> {
    let shared = Arc::downgrade(shared);
    let hook = Hook::after_accumulate(param, move || {
        if let Some(shared) = shared.upgrade() {
            shared.fired(place);
        }
    });
    hook.map_err(|error| match error {
        Error::Torch(reason) if reason.contains("already has a hook") => Error::invalid(format!(
            "the parameter `{name}` already belongs to a DistributedOptimizer, or is listed twice; drop the other first"
        )),
        error => error,
    })
}
