//! The loss: cross-entropy in nats, always in f32 or wider.

use tch::{Kind, Reduction, Tensor};

use super::fused::{HeadLoss, HeadOptions, linear_cross_entropy};
use super::{Dropout, TransformerLM, token_shape};
use crate::{Error, Result};

/// A label that is left out of the loss.
pub const IGNORE_INDEX: i64 = -100;

/// What a batch adds to a mean over many batches and ranks.
#[derive(Debug)]
pub struct LossSums {
    /// Sum of the valid tokens' losses in nats, a scalar of f32 (of f64 where the model is); call `backward` on it
    /// divided by the number of tokens of the whole step.
    pub loss: Tensor,
    /// How many tokens are valid.
    pub tokens: i64,
    /// How many of them the model finds likeliest, an int64 scalar on the model's device; counted on request.
    pub correct: Option<Tensor>,
}

impl TransformerLM {
    /// The loss of a loader's batch (B, T+1): tokens `0..T` are the input, tokens `1..T+1` what it is to predict.
    /// All of them count. `accuracy` asks for [`LossSums::correct`] too, which costs a pass over the logits.
    ///
    /// # Errors
    /// As [`TransformerLM::loss_sum`].
    pub fn batch_loss(&self, batch: &Tensor, train: bool, accuracy: bool) -> Result<LossSums> {
        let (input_ids, targets) = shifted(batch)?;
        self.loss_sum(&input_ids, &targets, None, train, accuracy)
    }

    /// As [`TransformerLM::batch_loss`] in training, with this dropout.
    pub(super) fn training_loss(&self, batch: &Tensor, dropout: &Dropout, accuracy: bool) -> Result<LossSums> {
        let (input_ids, targets) = shifted(batch)?;
        let hidden = self.hidden_dropping(&input_ids, None, dropout)?; // (B, T, D)
        self.head_sums(&hidden, &self.wte.values, &targets, true, accuracy)
    }

    /// The summed loss of `input_ids` (B, T) against `targets` (B, T), which are *not* shifted inside: `targets[b, t]`
    /// follows `input_ids[b, t]`. A target of −100 is left out.
    ///
    /// # Errors
    /// Shapes that do not fit, ids or targets outside the vocabulary.
    pub fn loss_sum(
        &self,
        input_ids: &Tensor,
        targets: &Tensor,
        attention_mask: Option<&Tensor>,
        train: bool,
        accuracy: bool,
    ) -> Result<LossSums> {
        if input_ids.size() != targets.size() {
            let (ids, targets) = (input_ids.size(), targets.size());
            return Err(Error::Config(format!("targets of {targets:?} for token ids of {ids:?}; expected the same")));
        }
        let hidden = self.hidden(input_ids, attention_mask, train)?; // (B, T, D)
        self.head_sums(&hidden, &self.wte.values, targets, train, accuracy)
    }

    /// Hidden states (B, T, D) against targets (B, T), by a head of weights (vocabulary, D); smoothed in training.
    pub(super) fn head_sums(
        &self,
        hidden: &Tensor,
        wte: &Tensor,
        targets: &Tensor,
        train: bool,
        accuracy: bool,
    ) -> Result<LossSums> {
        let options =
            HeadOptions { smoothing: self.smoothing(train), ignore_index: IGNORE_INDEX, count_correct: accuracy };
        let (rows, targets) = (hidden.reshape([-1, self.config().d_model as i64]), targets.reshape([-1])); // (B·T, D), (B·T)
        match linear_cross_entropy(&rows, wte, &targets, options)? {
            Some(HeadLoss { loss, correct }) => {
                Ok(LossSums { loss, tokens: valid(&targets), correct: correct.map(Tensor::from) })
            }
            None => {
                self.check_targets(&targets)?; // CUDA would end the process
                self.sums(&rows.linear::<Tensor>(wte, None), &targets, train, accuracy)
            }
        }
    }

    fn smoothing(&self, train: bool) -> f64 {
        if train { self.config().label_smoothing } else { 0.0 }
    }

    fn check_targets(&self, targets: &Tensor) -> Result<()> {
        let vocabulary = self.config().vocab_size as i64;
        let bad = targets.ne(IGNORE_INDEX).logical_and(&targets.lt(0).logical_or(&targets.ge(vocabulary)));
        match bad.any().int64_value(&[]) {
            0 => Ok(()),
            _ => Err(self.bad_ids(targets)),
        }
    }

    /// The mean loss of logits (B, T, vocabulary) against labels (B, T) that are shifted here; 0 if none is valid.
    pub(super) fn shifted_loss(&self, logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let (b, t) = token_shape(labels)?;
        if logits.size()[..2] != [b, t] {
            let given = &logits.size()[..2];
            return Err(Error::Config(format!("labels of [{b}, {t}] for token ids of {given:?}; expected the same")));
        }
        let sums = self.sums(&logits.narrow(1, 0, t - 1), &labels.narrow(1, 1, t - 1), false, false)?;
        Ok(sums.loss / sums.tokens.max(1) as f64)
    }

    /// Logits (B, T, vocabulary) against targets (B, T); smoothed in training.
    pub(super) fn sums(&self, logits: &Tensor, targets: &Tensor, train: bool, accuracy: bool) -> Result<LossSums> {
        let logits = logits.reshape([-1, self.config().vocab_size as i64]); // (B·T, vocabulary)
        let logits = if logits.kind() == Kind::Double { logits } else { logits.to_kind(Kind::Float) };
        let targets = targets.reshape([-1]); // (B·T)
        let loss = logits
            .f_cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, IGNORE_INDEX, self.smoothing(train))
            .map_err(|_| self.bad_ids(&targets))?;
        let tokens = valid(&targets);
        let correct = accuracy.then(|| tch::no_grad(|| logits.argmax(1, false).eq_tensor(&targets).sum(Kind::Int64)));
        Ok(LossSums { loss, tokens, correct })
    }
}

/// How many targets count.
fn valid(targets: &Tensor) -> i64 {
    targets.ne(IGNORE_INDEX).sum(Kind::Int64).int64_value(&[])
}

/// The input (B, T) and the targets (B, T) of a loader's batch (B, T+1).
pub(super) fn shifted(batch: &Tensor) -> Result<(Tensor, Tensor)> {
    match token_shape(batch)?.1 - 1 {
        0 => Err(Error::Config("a batch of single tokens leaves nothing to predict".into())),
        t => Ok((batch.narrow(1, 0, t), batch.narrow(1, 1, t))),
    }
}
