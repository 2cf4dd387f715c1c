//! All ranks start from rank 0's parameters and optimizer state.
//!
//! `mpirun -np 2 target/release/examples/broadcast`

use hvd_torch::{AdamW, Optimizer, ParamGroup};
use tch::{Device, Kind, Tensor};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let rank = world.rank() as f64;

    let weight = Tensor::full([2, 3], rank, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let mask = Tensor::from_slice(&[true, rank == 0.0]);
    let tensors = vec![("weight".to_string(), weight.shallow_clone()), ("mask".to_string(), mask.shallow_clone())];
    hvd_torch::broadcast_parameters(&tensors, 0)?;
    assert_eq!(weight.sum(Kind::Double).double_value(&[]), 0.0);
    assert_eq!(mask, Tensor::from_slice(&[true, true]));

    // Rank 0 has made an update that the others have not.
    let params = vec![("weight".to_string(), weight.shallow_clone())];
    let mut adamw = AdamW::new(vec![ParamGroup { params, lr: 0.1, weight_decay: 0.0 }], (0.9, 0.999), 1e-8)?;
    if hvd_torch::is_main_process() {
        weight.sum(Kind::Float).backward();
        adamw.step()?;
    }
    hvd_torch::broadcast_optimizer_state(&mut adamw, 0)?;
    let steps = adamw.state()?.into_iter().find(|(name, _)| name == "step.weight");
    assert_eq!(steps.map(|(_, steps)| steps.double_value(&[])), Some(1.0));
    if hvd_torch::is_main_process() {
        println!("{} rank(s) have the same parameters and optimizer state", world.size());
    }
    hvd_torch::shutdown()?;
    Ok(())
}
