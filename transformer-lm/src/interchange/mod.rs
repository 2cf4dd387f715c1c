//! Models to and from other programs: folders in the format of Hugging Face's `transformers`, as its GPT-2.
//!
//! ```text
//! config.json              shape, activation and what else GPT-2 can vary
//! model.safetensors        weights under GPT-2's names, dense ones (in, out) as its Conv1D holds them
//! tokenizer.json           in the format of the `tokenizers` library
//! tokenizer_config.json    which of its tokens are special
//! ```
//!
//! What this model lacks (another activation, an untied head …) is refused by name when such a folder is read.

mod config;
mod layout;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};

use tch::Device;

use crate::checkpoint::{CheckpointState, Contents, FORMAT_VERSION, publish, save_checkpoint, sync_all};
use crate::config::{AmpDtype, ModelSection, TrainingSection};
use crate::data::{TOKENIZER_FILE, Tokenizer};
use crate::generate::load_model_for_generation;
use crate::model::ModelConfig;
use crate::{Config, Error, Result};

/// What [`import_hf`] found.
#[derive(Debug)]
pub struct Imported {
    /// The shape of the model.
    pub model: ModelSection,
    /// Its tokenizer, where the folder has one.
    pub tokenizer: Option<Tokenizer>,
    /// What a person should know of it.
    pub notes: Vec<String>,
}

/// Writes the model and tokenizer of `checkpoint` (as in [`load_model_for_generation`]) into the new folder `output`, which
/// `transformers` loads as GPT-2. Sinusoidal positions become a table like learned ones. Gives the model's shape.
///
/// # Errors
/// No whole checkpoint; an `output` that is there and not empty; [`Error::Io`]. Then nothing is left behind.
pub fn export_hf(checkpoint: &Path, output: &Path) -> Result<ModelConfig> {
    let (model, tokenizer, _) = load_model_for_generation(checkpoint, None, Device::Cpu)?;
    let staging = Staging::beside(output)?;
    weights::write(&model, &staging.folder.join(weights::FILE))?;
    config::write(&model, &tokenizer, &staging.folder)?;
    tokenizer::write(&tokenizer, model.config(), &staging.folder)?;
    sync_all(&staging.folder)?;
    publish(&staging.folder, &staging.target)?;
    Ok(model.config().clone())
}

/// Reads the GPT-2 in the folder `input` and makes the checkpoint `output` of it, with weights in f32 and no updates done: to
/// evaluate, to generate, and to start training from (`training.init_from`).
///
/// # Errors
/// [`Error::Data`] that names the file and what is wrong with it; an `output` that is there and not empty. Then nothing is
/// left behind.
pub fn import_hf(input: &Path, output: &Path) -> Result<Imported> {
    if !input.is_dir() {
        return Err(Error::data(input, "there is no such folder; expected one with config.json and model.safetensors"));
    }
    let (section, mut notes) = config::read(input)?;
    // `lm evaluate` computes as the checkpoint's configuration says: with these weights as they are.
    let training = TrainingSection { amp_dtype: AmpDtype::Fp32, ..TrainingSection::default() };
    let config = Config { model: section, training, ..Config::default() };
    let shape = config.model_config(0);
    let model = weights::read(input, &shape)?;
    let tokenizer = tokenizer::read(input, &shape, &mut notes)?;

    let staging = Staging::beside(output)?;
    let kept = match &tokenizer {
        Some(tokenizer) => tokenizer.save(&staging.folder).map(|()| Some(staging.folder.join(TOKENIZER_FILE)))?,
        None => None,
    };
    let state = CheckpointState {
        format_version: FORMAT_VERSION,
        seed: config.seed.0,
        world_size: 1,
        ..CheckpointState::default()
    };
    let contents =
        Contents { model: &model, optimizer: &[], state: &state, config: &config, tokenizer: kept.as_deref() };
    let (parent, name) = staging.place();
    save_checkpoint(parent, name, &contents)?;
    Ok(Imported { model: config.model, tokenizer, notes })
}

/// A folder to make files in, beside the one that they are for. It is gone when this is dropped, and so are parents that were made for
/// it and hold nothing.
struct Staging {
    folder: PathBuf,
    target: PathBuf,
    /// Deepest first.
    made: Vec<PathBuf>,
}

impl Staging {
    /// Refuses a `target` that holds something.
    fn beside(target: &Path) -> Result<Staging> {
        let target = std::path::absolute(target).map_err(Error::io("find", target))?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name().and_then(|name| name.to_str())) else {
            return Err(Error::data(&target, "not a name that a folder can be given; choose another --output"));
        };
        let is_vacant = match std::fs::read_dir(&target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(_) => !target.exists(),
        };
        if !is_vacant {
            return Err(Error::data(&target, "is there already and not empty; choose another --output or remove it"));
        }
        let folder = parent.join(format!(".tmp-interchange-{name}-{}", std::process::id()));
        let made = parent.ancestors().take_while(|parent| !parent.exists()).map(Path::to_path_buf).collect();
        let staging = Staging { folder, target, made };
        std::fs::create_dir_all(&staging.folder).map_err(Error::io("create", &staging.folder))?;
        Ok(staging)
    }

    /// The target's parent and name; [`Staging::beside`] has seen that there are both.
    fn place(&self) -> (&Path, &str) {
        let name = self.target.file_name().and_then(|name| name.to_str());
        (self.target.parent().unwrap_or(Path::new("/")), name.unwrap_or_default())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
        for parent in &self.made {
            let _ = std::fs::remove_dir(parent); // one that holds something stays
        }
    }
}
