//! Reads, changes and saves a configuration; mistakes are found at once.

use std::error::Error;
use std::path::Path;

use transformer_lm::{Config, load_config};

const FILE: &str = "\
model: {d_model: 256, n_heads: 8}
training:
  epochs: 3
  learning_rate: 6.0e-4
";

fn main() -> Result<(), Box<dyn Error>> {
    std::fs::write("small.yaml", FILE)?;
    let config = load_config("small.yaml")?;
    assert_eq!((config.model.d_model, config.training.epochs), (256, 3));
    assert_eq!(config.model.n_layers, 12); // what the file does not name has its default

    // The file, then single keys, as `train --config small.yaml --set training.epochs=5` does.
    let longer = Config::load(Some(Path::new("small.yaml")), &["training.epochs=5".into()])?;
    assert_eq!(longer.training.epochs, 5);

    // Fields are ordinary fields; as a tree of values it can be laid over another one.
    let mut smaller = config.clone();
    smaller.model.n_layers = 2;
    let merged = longer.merge(smaller.to_dict())?;
    assert_eq!((merged.model.n_layers, merged.training.epochs), (2, 3));
    assert_eq!(merged.to_dict()["training"]["learning_rate"], 6.0e-4);

    merged.save("merged.yaml")?; // with every key
    assert_eq!(load_config("merged.yaml")?, merged);

    let mistake = Config::from_yaml("training: {epoch: 3}", "typo.yaml").expect_err("there is no such key");
    assert_eq!(mistake.to_string(), "typo.yaml: unknown key `training.epoch`; did you mean `training.epochs`?");
    let mistake = Config::from_yaml("model: {n_heads: 5}", "heads.yaml").expect_err("5 does not divide 768");
    println!("{mistake}");
    Ok(())
}
