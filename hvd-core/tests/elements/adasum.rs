//! Adasum from its definition. The tests with several processes read this file, too.

/// Says how far `got` is from the Adasum of the ranks' vectors, if that is more than roundings explain: on each of log₂ n levels one of
/// relative size `epsilon`, and those of sums in f64 over all elements; measured by the lengths of the vectors.
pub fn check(vectors: Vec<Vec<f64>>, got: &[f64], epsilon: f64) -> Result<(), String> {
    let lengths: f64 = vectors.iter().map(|vector| dot(vector, vector).sqrt()).sum();
    let levels = f64::from(vectors.len().ilog2() + 2);
    let epsilon = epsilon + got.len() as f64 * f64::EPSILON;
    let difference: Vec<_> = adasum(vectors).iter().zip(got).map(|(want, got)| want - got).collect();
    let (error, bound) = (dot(&difference, &difference).sqrt(), 4.0 * levels * epsilon * lengths);
    if error <= bound {
        Ok(())
    } else {
        Err(format!("Adasum of {} elements is off by {error}, bound {bound}", got.len()))
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Of two.
fn pair(a: &[f64], b: &[f64]) -> Vec<f64> {
    let factor = |square: f64| if square == 0.0 { 1.0 } else { 1.0 - dot(a, b) / (2.0 * square) };
    let (for_a, for_b) = (factor(dot(a, a)), factor(dot(b, b)));
    a.iter().zip(b).map(|(a, b)| for_a * a + for_b * b).collect()
}

/// Of any number: those beyond a power of two are folded in, then neighbours are combined until one is left.
fn adasum(mut vectors: Vec<Vec<f64>>) -> Vec<f64> {
    let core = 1 << vectors.len().ilog2();
    for (rank, extra) in vectors.split_off(core).iter().enumerate() {
        vectors[rank] = pair(&vectors[rank], extra);
    }
    while vectors.len() > 1 {
        vectors = vectors.chunks(2).map(|two| pair(&two[0], &two[1])).collect();
    }
    vectors.remove(0)
}
