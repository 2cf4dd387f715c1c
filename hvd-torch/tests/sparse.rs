//! Sparse gradients in a DistributedOptimizer, with ranks that are threads.

mod common;

use common::{SIZES, adamw, numbers, ranks, values, watched};
use hvd_torch::{Builder, DistributedOptimizer, Optimizer, ReduceOp, TchOptimizer, World, set_grad};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};

#[test]
fn a_sparse_gradient_is_made_dense() {
    watched(|| {
        ranks(2, |world| {
            let table = numbers(&[6, 2], Kind::Float, 1).detach().set_requires_grad(true);
            let params = vec![("table".to_string(), table.shallow_clone())];
            let mut optimizer = DistributedOptimizer::builder(adamw(params)).world(world.clone()).build().unwrap();
            // Without a gradient that is there, torch makes a sparse one.
            set_grad(&table, None).unwrap();
            let rows = Tensor::from_slice(&[world.rank() as i64, 5]);
            Tensor::embedding(&table, &rows, -1, false, true).sum(Kind::Float).backward();
            optimizer.synchronize().unwrap();
            assert_eq!(values(&table.grad().select(1, 0)), [0.5, 0.5, 0.0, 0.0, 0.0, 1.0]);
        });
    });
}

/// A table of which each rank uses a few rows, and a dense layer behind it.
struct Lookup {
    vars: nn::VarStore,
    table: Tensor,
    weight: Tensor,
}

impl Lookup {
    fn new() -> Self {
        let vars = nn::VarStore::new(Device::Cpu);
        let table = vars.root().var_copy("table", &numbers(&[8, 3], Kind::Double, 1));
        let weight = vars.root().var_copy("weight", &numbers(&[3], Kind::Double, 2));
        Lookup { vars, table, weight }
    }

    fn loss(&self, rows: &[i64]) -> Tensor {
        let found = Tensor::embedding(&self.table, &Tensor::from_slice(rows), -1, false, true);
        (found * &self.weight).sin().sum(Kind::Double)
    }

    fn builder(&self, world: &World) -> Builder<TchOptimizer> {
        let sgd = nn::sgd(0.0, 0.0, 0.0, false).build(&self.vars, 0.5).unwrap();
        let sgd = TchOptimizer::new(sgd, &self.vars).unwrap();
        DistributedOptimizer::builder(sgd).world(world.clone()).sparse(["table"])
    }

    /// Trains with two backward passes a step and clipping: norms, and the values at the end.
    fn train(&self, world: &World, as_dense: bool, op: ReduceOp) -> Vec<f64> {
        let builder = self.builder(world).sparse_as_dense(as_dense).op(op).backward_passes_per_step(2);
        let mut optimizer = builder.build().unwrap();
        let mut seen = Vec::new();
        for step in 0..4 {
            optimizer.zero_grad().unwrap();
            for pass in 0..2 {
                // Rank 1 does without the table in step 1, all do in step 2.
                match (step, world.rank()) {
                    (1, 1) | (2, _) => self.weight.sum(Kind::Double).backward(),
                    (_, rank) => self.loss(&[rank as i64, 5, 5 + pass]).backward(),
                }
            }
            seen.push(optimizer.clip_grad_norm(0.7).unwrap());
            optimizer.scale_gradients(0.5).unwrap();
            assert_eq!(self.table.grad().is_sparse(), !as_dense);
            optimizer.step().unwrap();
        }
        seen.iter().copied().chain(values(&self.table)).chain(values(&self.weight)).collect()
    }
}

#[test]
fn gradients_that_stay_sparse_train_like_dense_ones() {
    watched(|| {
        for size in SIZES {
            for op in [ReduceOp::Average, ReduceOp::Sum, ReduceOp::Adasum] {
                let sparse = ranks(size, |world| Lookup::new().train(&world, false, op));
                let dense = ranks(size, |world| Lookup::new().train(&world, true, op));
                let parameters = |all: &[f64]| all[4..].to_vec();
                assert!(sparse.iter().all(|rank| parameters(rank) == parameters(&sparse[0])), "ranks differ");
                for (sparse, dense) in sparse.iter().flatten().zip(dense.iter().flatten()) {
                    assert!((sparse - dense).abs() < 1e-12, "{size} ranks, {op:?}: {sparse} and {dense}");
                }
            }
        }
    });
}

#[test]
fn a_sparse_gradient_has_the_rows_of_all_ranks_and_no_others() {
    watched(|| {
        ranks(3, |world| {
            let model = Lookup::new();
            let mut optimizer = model.builder(&world).build().unwrap();
            assert_eq!(optimizer.buckets(), [["weight"]]);
            let rows = |optimizer: &mut DistributedOptimizer<TchOptimizer>| {
                optimizer.synchronize().unwrap();
                values(&model.table.grad().indices())
            };
            model.loss(&[world.rank() as i64, 5]).backward();
            let in_flight = optimizer.zero_grad().unwrap_err().to_string();
            assert!(in_flight.contains("being reduced"), "{in_flight}");
            assert_eq!(rows(&mut optimizer), [0.0, 1.0, 2.0, 5.0]);
            optimizer.zero_grad().unwrap();
            assert!(rows(&mut optimizer).is_empty());
            // On one rank the table is also used as a whole.
            optimizer.zero_grad().unwrap();
            let whole = model.table.sum(Kind::Double);
            let loss = model.loss(&[1]);
            (if world.rank() == 2 { loss + whole } else { loss }).backward();
            assert_eq!(rows(&mut optimizer).len(), 8);
            optimizer.step().unwrap();

            (0..2).for_each(|_| model.table.sum(Kind::Double).backward());
            let error = optimizer.step().unwrap_err().to_string();
            assert!(error.contains("more backward passes") && error.contains("`table`"), "{error}");
        });
    });
}

#[test]
fn sparse_gradients_that_cannot_be_are_refused() {
    watched(|| {
        ranks(2, |world| {
            let table = numbers(&[6, 2], Kind::Float, 1).detach().set_requires_grad(true);
            let scalar = Tensor::from(1.0f32).set_requires_grad(true);
            let of_adamw = || {
                let adamw = adamw(vec![("table".to_string(), table.shallow_clone())]);
                DistributedOptimizer::builder(adamw).world(world.clone()).sparse(["table"])
            };
            let error = of_adamw().build().map(drop).unwrap_err().to_string();
            assert!(error.contains("`table`") && error.contains("sparse_as_dense(true)"), "{error}");
            of_adamw().sparse_as_dense(true).groups([["table".to_string()].to_vec()]).build().unwrap();

            let model = Lookup::new();
            let refused = |builder: Builder<TchOptimizer>, text: &str| {
                let error = builder.build().map(drop).unwrap_err().to_string();
                assert!(error.contains(text), "{error}");
            };
            refused(model.builder(&world).sparse(["nobody"]), "`nobody`");
            refused(model.builder(&world).groups([vec!["table"]]), "cannot be reduced in a group");
            // The ranks must agree on what is sparse.
            let differs = model.builder(&world).sparse_as_dense(world.rank() == 1);
            refused(differs, "rank 1 wraps other parameters");
            let vars = nn::VarStore::new(Device::Cpu);
            let _ = vars.root().var_copy("scalar", &scalar);
            let sgd = TchOptimizer::new(nn::Sgd::default().build(&vars, 0.5).unwrap(), &vars).unwrap();
            refused(DistributedOptimizer::builder(sgd).world(world.clone()).sparse(["scalar"]), "no rows");

            Tensor::embedding(&table, &Tensor::from_slice(&[3i64]), -1, false, true).sum(Kind::Float).backward();
            set_grad(&table, Some(&table.grad().to_sparse_sparse_dim(1))).unwrap();
            let error = adamw(vec![("table".into(), table)]).step().unwrap_err().to_string();
            assert!(error.contains("cannot update `table` from a sparse gradient"), "{error}");
        });
    });
}
