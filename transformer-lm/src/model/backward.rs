//! Loss and gradients of a micro-batch, with the activations kept or computed twice.

use hvd_torch::{Autocast, autograd};
use tch::{Kind, Tensor};

use super::block::Stream;
use super::fused::Attend;
use super::loss::{LossSums, shifted};
use super::{Dropout, TransformerLM, of_block};
use crate::Result;

/// How [`TransformerLM::backward`] computes.
#[derive(Clone, Copy, Debug)]
pub struct Backward {
    /// The gradients are those of the summed loss times this.
    pub factor: f64,
    /// Asks for [`LossSums::correct`].
    pub accuracy: bool,
    /// Precision of products under autocast; none: the parameters'.
    pub autocast: Option<Kind>,
}

impl TransformerLM {
    /// Adds the gradients of the loss of a loader's batch (B, T+1) to the parameters' gradients; gives the loss, detached.
    ///
    /// With [`ModelConfig::gradient_checkpointing`](super::ModelConfig::gradient_checkpointing) only each block's input is
    /// kept (Chen et al., 2016), and a block is computed again when its gradients are: a third more arithmetic, and the
    /// memory of one block's activations instead of all. The gradients are the same to the bit.
    ///
    /// Dropout has masks from torch's generator.
    ///
    /// # Errors
    /// As [`TransformerLM::loss_sum`]; where torch fails.
    pub fn backward(&self, batch: &Tensor, how: &Backward) -> Result<LossSums> {
        self.backward_watched(batch, how, &self.draw_dropout(batch)?, || {})
    }

    /// As [`TransformerLM::backward`] with this dropout; calls `forward_done` between the forward and the backward pass.
    pub(crate) fn backward_watched(
        &self,
        batch: &Tensor,
        how: &Backward,
        dropout: &Dropout,
        forward_done: impl FnOnce(),
    ) -> Result<LossSums> {
        let sums = match self.config().gradient_checkpointing {
            true => self.backward_recomputing(batch, how, dropout, forward_done)?,
            false => {
                let sums = self.cast(how, || self.training_loss(batch, dropout, how.accuracy))?;
                forward_done();
                (&sums.loss * how.factor).f_backward()?;
                sums
            }
        };
        Ok(LossSums { loss: sums.loss.detach(), ..sums })
    }

    fn backward_recomputing(
        &self,
        batch: &Tensor,
        how: &Backward,
        dropout: &Dropout,
        forward_done: impl FnOnce(),
    ) -> Result<LossSums> {
        let (input_ids, targets) = shifted(batch)?;
        let parts = Parts { model: self, how, input_ids, dropout };
        let mut inputs = tch::no_grad(|| parts.inputs())?;

        // The embedding's weights are used at both ends, but a gradient may arrive only once for each parameter, as its
        // hook counts them: what the head adds is collected apart.
        let (x, wte) = (leaf(&inputs[self.blocks.len()]), leaf(&self.wte.values));
        let sums = self.cast(how, || {
            let (_, hidden) = self.ln_f.forward(Stream::new(x.shallow_clone()))?;
            self.head_sums(&hidden, &wte, &targets, true, how.accuracy)
        })?;
        forward_done();
        (&sums.loss * how.factor).f_backward()?;

        let mut gradient = x.f_grad()?;
        for layer in (0..self.blocks.len()).rev() {
            let x = leaf(&inputs[layer]);
            inputs.truncate(layer);
            autograd::backward(&[(&parts.block(layer, &x)?, Some(&gradient))], false)?;
            gradient = x.f_grad()?;
        }
        autograd::accumulate(&self.wte.values, |sum, onto| onto.add(&sum, &wte.f_grad()?))?;
        autograd::backward(&[(&parts.embed()?, Some(&gradient))], false)?;
        Ok(sums)
    }

    /// Runs a forward pass, under autocast where asked for.
    fn cast<T>(&self, how: &Backward, forward: impl FnOnce() -> Result<T>) -> Result<T> {
        let _guard = how.autocast.map(|kind| Autocast::enter(self.device(), kind)).transpose()?;
        forward()
    }
}

/// The parts of a forward pass before its head, each of which can be computed again.
struct Parts<'a> {
    model: &'a TransformerLM,
    how: &'a Backward,
    input_ids: Tensor,
    dropout: &'a Dropout,
}

impl Parts<'_> {
    fn embed(&self) -> Result<Tensor> {
        self.model.cast(self.how, || self.model.embed(&self.input_ids, 0, self.dropout))
    }

    /// The residual stream after a block, (B, T, D), of that before it.
    fn block(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let (stream, dropout) = (Stream::new(x.shallow_clone()), of_block(self.dropout, layer));
        let block = &self.model.blocks[layer];
        self.model.cast(self.how, || block.forward(stream, &Attend::Causal, None, &dropout)?.sum())
    }

    /// What goes into each block, and into the head: (B, T, D).
    fn inputs(&self) -> Result<Vec<Tensor>> {
        let mut inputs = vec![self.embed()?];
        for layer in 0..self.model.blocks.len() {
            inputs.push(self.block(layer, &inputs[layer])?);
        }
        Ok(inputs)
    }
}

/// The same elements as the start of a graph of their own.
fn leaf(tensor: &Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}
