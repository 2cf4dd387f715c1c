//! AdamW with its moments spread over ranks must do just what AdamW does.

use hvd_torch::{AdamW, Optimizer, ParamGroup, ShardedAdamW, World, set_grad};
use tch::{Kind, Tensor};

const BETAS: (f64, f64) = (0.9, 0.95);

/// Parameters of different sizes in two groups, the same on every call.
fn groups() -> Vec<ParamGroup> {
    let parameter = |index: i64| {
        let values = (Tensor::arange(index * 7 + 1, (Kind::Float, tch::Device::Cpu)) * 0.37).sin();
        (format!("p{index}"), values.set_requires_grad(true))
    };
    let group = |range: std::ops::Range<i64>, weight_decay| ParamGroup {
        params: range.map(parameter).collect(),
        lr: 0.1,
        weight_decay,
    };
    vec![group(0..3, 0.1), group(3..5, 0.0)]
}

fn give_gradients(optimizer: &dyn Optimizer, step: i64) {
    for (index, (_, parameter)) in optimizer.parameters().into_iter().enumerate() {
        let gradient = (parameter.detach() * (step + 1) as f64 + index as f64).cos();
        set_grad(&parameter, Some(&gradient)).expect("a gradient");
    }
}

fn run(optimizer: &mut dyn Optimizer, steps: std::ops::Range<i64>) {
    for step in steps {
        give_gradients(optimizer, step);
        optimizer.step().expect("a step");
    }
}

/// Tensors by name, as numbers.
type Values = Vec<(String, Vec<f32>)>;

fn values(tensors: &[(String, Tensor)]) -> Values {
    tensors.iter().map(|(name, t)| (name.clone(), Vec::try_from(t.detach().reshape([-1])).expect("values"))).collect()
}

/// Parameters and state of a plain AdamW.
fn plain(steps: i64) -> (Values, Values) {
    let mut adamw = AdamW::new(groups(), BETAS, 1e-8).expect("AdamW");
    run(&mut adamw, 0..steps);
    (values(&adamw.parameters()), values(&adamw.state().expect("state")))
}

#[test]
fn the_same_bits_as_adamw_on_any_number_of_ranks() {
    let (parameters, state) = plain(6);
    for ranks in [1, 2, 3, 7] {
        World::threads(ranks, |world| {
            let mut sharded = ShardedAdamW::new(world.clone(), groups(), BETAS, 1e-8).expect("a sharded AdamW");
            run(&mut sharded, 0..6);
            assert_eq!(values(&sharded.parameters()), parameters);
            let gathered = values(&sharded.state().expect("state"));
            assert_eq!(gathered, if world.rank() == 0 { state.clone() } else { Vec::new() });
            world.shutdown().expect("a peaceful end");
        });
    }
}

#[test]
fn a_state_of_rank_0_goes_on_where_it_was() {
    let (parameters, _) = plain(6);
    World::threads(3, |world| {
        let mut first = ShardedAdamW::new(world.clone(), groups(), BETAS, 1e-8).expect("a sharded AdamW");
        run(&mut first, 0..4);
        let state = first.state().expect("state");
        let mut second = ShardedAdamW::new(world.clone(), groups(), BETAS, 1e-8).expect("a sharded AdamW");
        for ((_, mut to), (_, from)) in second.parameters().into_iter().zip(first.parameters()) {
            tch::no_grad(|| to.copy_(&from));
        }
        second.load_state(&state).expect("the state fits");
        run(&mut second, 4..6);
        assert_eq!(values(&second.parameters()), parameters);
        world.shutdown().expect("a peaceful end");
    });
}

#[test]
fn a_state_of_another_model_is_refused() {
    World::threads(1, |world| {
        let mut sharded = ShardedAdamW::new(world, groups(), BETAS, 1e-8).expect("a sharded AdamW");
        let error = sharded.load_state(&[]).expect_err("nothing given").to_string();
        assert!(error.contains("exp_avg.p0"), "{error}");
    });
}
