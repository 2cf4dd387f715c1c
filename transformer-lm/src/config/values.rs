//! Values that are one of a few words.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `training.amp_dtype`: precision of the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AmpDtype {
    /// Products in bfloat16, weights and sums in fp32. On a CPU without AVX-512 the products are in fp32 too: bfloat16 would be slower.
    Bf16,
    /// Products in fp16 with a loss scaler; CUDA only.
    Fp16,
    /// All in fp32.
    Fp32,
    /// All in fp64: slow, for tests.
    Fp64,
}

/// `training.lr_schedule`: what the learning rate does after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Falls in a straight line to `min_lr`.
    Linear,
    /// Falls along half a cosine to `min_lr`.
    Cosine,
    /// Stays.
    Constant,
    /// Warmup, stable, decay: stays, and falls in a straight line to `min_lr` over the last `lr_decay_share` of the updates.
    Wsd,
}

/// `training.weight_decay_on`: which parameters decay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightDecayOn {
    /// Embeddings and dense weights; biases and gains have no reason to be small.
    #[default]
    Matrices,
    /// Every parameter, as the reference does.
    All,
}

/// `distributed.horovod_compression`: what gradients are on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HorovodCompression {
    /// As they are.
    #[default]
    None,
    /// 16-bit floats with 5 bits of exponent.
    Fp16,
    /// 16-bit floats with 8 bits of exponent.
    Bf16,
}

/// `model.vocab_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VocabSize {
    /// The vocabulary of the prepared data.
    Auto,
    /// This many tokens.
    Fixed(usize),
}

impl Serialize for VocabSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            VocabSize::Auto => serializer.serialize_str("auto"),
            VocabSize::Fixed(size) => size.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for VocabSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Word(String),
            Size(usize),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Word(word) if word == "auto" => Ok(VocabSize::Auto),
            Raw::Word(word) => Err(serde::de::Error::custom(format!("`{word}` is neither a number nor `auto`"))),
            Raw::Size(size) => Ok(VocabSize::Fixed(size)),
        }
    }
}

/// `training.device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA; the device of the local rank, or the one given.
    Cuda(Option<usize>),
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(DeviceChoice::Auto),
            ("cpu", _) => Ok(DeviceChoice::Cpu),
            ("cuda", _) => Ok(DeviceChoice::Cuda(None)),
            (_, Some(Ok(index))) => Ok(DeviceChoice::Cuda(Some(index))),
            _ => Err(format!("`{text}` is none of auto, cpu, cuda, cuda:N")),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(None) => f.write_str("cuda"),
            DeviceChoice::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
