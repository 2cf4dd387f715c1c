//! GPT-2's tensors: names, shapes, and how they lie in its files.

use crate::model::ModelConfig;

/// One of GPT-2's tensors, as a file holds it.
#[derive(Debug)]
pub(super) struct Entry {
    /// Without `transformer.`, which is also our name for it.
    pub name: String,
    /// In the file.
    pub shape: Vec<i64>,
    /// Whether it is a dense weight: (in, out) in the file, (out, in) here.
    pub is_dense: bool,
}

/// All tensors of a model of this shape, one after the other: a made-up number of layers costs nothing.
pub(super) fn entries(shape: &ModelConfig) -> impl Iterator<Item = Entry> {
    let [v, p, d, f] = [shape.vocab_size, shape.max_seq_len, shape.d_model, shape.d_ff].map(|size| size as i64);
    let plain = |name: String, shape: &[i64]| Entry { name, shape: shape.to_vec(), is_dense: false };
    let norm = move |name: String| [plain(format!("{name}.weight"), &[d]), plain(format!("{name}.bias"), &[d])];
    let dense = move |name: String, inputs: i64, outputs: i64| {
        let weight = Entry { name: format!("{name}.weight"), shape: vec![inputs, outputs], is_dense: true };
        [weight, plain(format!("{name}.bias"), &[outputs])]
    };
    let block = move |layer: usize| {
        let name = |part: &str| format!("h.{layer}.{part}");
        [
            norm(name("ln_1")),
            dense(name("attn.c_attn"), d, 3 * d),
            dense(name("attn.c_proj"), d, d),
            norm(name("ln_2")),
            dense(name("mlp.c_fc"), d, f),
            dense(name("mlp.c_proj"), f, d),
        ]
    };
    let embeddings = [plain("wte.weight".into(), &[v, d]), plain("wpe.weight".into(), &[p, d])];
    embeddings.into_iter().chain((0..shape.n_layers).flat_map(block).flatten()).chain(norm("ln_f".into()))
}
