//! Writes a timeline of a few operations that <https://ui.perfetto.dev> opens.
//!
//! `hvdrun -np 2 target/release/examples/timeline /tmp/timeline.json`

use hvd_torch::ReduceOp;
use tch::Tensor;

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let path = match std::env::args().nth(1) {
        Some(path) => path.into(),
        None => std::env::temp_dir().join(format!("timeline-{}.json", std::process::id())),
    };
    hvd_torch::start_timeline(&path, true)?;
    for step in 0..3 {
        let rank = Tensor::from_slice(&[world.rank() as f32, step as f32]);
        hvd_torch::allreduce_(&rank, "ranks", ReduceOp::Sum)?;
    }
    hvd_torch::stop_timeline()?;

    let text = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text.starts_with("[\n") && text.matches("\"ALLREDUCE\"").count() >= 3, "{text}");
    if hvd_torch::is_main_process() {
        println!("{} rank(s): the timeline is in {}", world.size(), path.display());
    }
    if std::env::args().nth(1).is_none() {
        drop(std::fs::remove_file(&path));
    }
    hvd_torch::shutdown()?;
    Ok(())
}
