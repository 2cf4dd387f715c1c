//! GPT-2 once more, in plain loops over `f64`: slow, obvious, and sharing nothing with the library but the names.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};
use transformer_lm::model::ModelConfig;

/// A matrix as rows.
pub type Rows = Vec<Vec<f64>>;

/// Parameters by name, each flattened in row-major order.
pub struct Reference {
    pub parameters: BTreeMap<String, Vec<f64>>,
    config: ModelConfig,
}

impl Reference {
    pub fn of(parameters: &[(String, Tensor)], config: &ModelConfig) -> Self {
        let values = |t: &Tensor| Vec::<f64>::try_from(t.to_kind(Kind::Double).contiguous().view([-1])).unwrap();
        let parameters = parameters.iter().map(|(name, tensor)| (name.clone(), values(tensor))).collect();
        Self { parameters, config: config.clone() }
    }

    /// Logits of one sequence. `visible[j]` tells whether others may look at token `j`.
    pub fn logits(&self, ids: &[usize], visible: &[bool]) -> Rows {
        let d = self.config.d_model;
        let (wte, wpe) = (&self.parameters["wte.weight"], &self.parameters["wpe.weight"]);
        let embed = |(t, &id): (usize, &usize)| (0..d).map(|i| wte[id * d + i] + wpe[t * d + i]).collect();
        let mut x: Rows = ids.iter().enumerate().map(embed).collect();
        for layer in 0..self.config.n_layers {
            let name = |part: &str| format!("h.{layer}.{part}");
            let attended = self.attention(&self.norm(&x, &name("ln_1")), &name("attn"), visible);
            add(&mut x, &attended);
            let hidden = self.linear(&self.norm(&x, &name("ln_2")), &name("mlp.c_fc"));
            let hidden: Rows = hidden.iter().map(|row| row.iter().map(|&v| gelu(v)).collect()).collect();
            add(&mut x, &self.linear(&hidden, &name("mlp.c_proj")));
        }
        let x = self.norm(&x, "ln_f");
        let head = |row: &Vec<f64>| (0..self.config.vocab_size).map(|v| dot(row, &wte[v * d..(v + 1) * d])).collect();
        x.iter().map(head).collect()
    }

    /// Sum over sequences of −ln p(target), targets of −100 left out; not shifted.
    pub fn loss_sum(&self, ids: &[Vec<usize>], targets: &[Vec<i64>]) -> f64 {
        let mut sum = 0.0;
        for (ids, targets) in ids.iter().zip(targets) {
            let logits = self.logits(ids, &vec![true; ids.len()]);
            for (row, &target) in logits.iter().zip(targets).filter(|(_, target)| **target != -100) {
                let highest = row.iter().copied().fold(f64::MIN, f64::max);
                let log_sum = highest + row.iter().map(|v| (v - highest).exp()).sum::<f64>().ln();
                sum += log_sum - row[target as usize];
            }
        }
        sum
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let (weight, bias) = self.pair(name);
        x.iter()
            .map(|row| {
                let n = row.len() as f64;
                let mean = row.iter().sum::<f64>() / n;
                let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
                let scale = 1.0 / (variance + 1e-5).sqrt();
                row.iter().enumerate().map(|(i, v)| (v - mean) * scale * weight[i] + bias[i]).collect()
            })
            .collect()
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let (weight, bias) = self.pair(name);
        let inputs = x[0].len();
        let output = |row: &Vec<f64>| {
            let value = |(o, b): (usize, &f64)| b + dot(row, &weight[o * inputs..(o + 1) * inputs]);
            bias.iter().enumerate().map(value).collect()
        };
        x.iter().map(output).collect()
    }

    fn attention(&self, x: &Rows, name: &str, visible: &[bool]) -> Rows {
        let (d, heads) = (self.config.d_model, self.config.n_heads);
        let width = d / heads;
        let qkv = self.linear(x, &format!("{name}.c_attn"));
        let mut mixed = vec![vec![0.0; d]; x.len()];
        for head in 0..heads {
            let part = |which: usize, t: usize| {
                let start = which * d + head * width;
                &qkv[t][start..start + width]
            };
            for (t, mixed) in mixed.iter_mut().enumerate() {
                let seen: Vec<usize> = (0..=t).filter(|&s| visible[s] || s == t).collect();
                let scores: Vec<f64> =
                    seen.iter().map(|&s| dot(part(0, t), part(1, s)) / (width as f64).sqrt()).collect();
                let weights: Vec<f64> = scores.iter().map(|v| v.exp()).collect();
                let total: f64 = weights.iter().sum();
                for (&s, weight) in seen.iter().zip(&weights) {
                    for i in 0..width {
                        mixed[head * width + i] += weight / total * part(2, s)[i];
                    }
                }
            }
        }
        self.linear(&mixed, &format!("{name}.c_proj"))
    }

    fn pair(&self, name: &str) -> (&[f64], &[f64]) {
        (&self.parameters[&format!("{name}.weight")], &self.parameters[&format!("{name}.bias")])
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut Rows, y: &Rows) {
    x.iter_mut().zip(y).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}
