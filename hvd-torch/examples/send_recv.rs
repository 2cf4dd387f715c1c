//! A tensor goes around all ranks in a ring.
//!
//! `hvdrun -np 2 target/release/examples/send_recv`

use tch::Tensor;

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank(), world.size());
    let visited = Tensor::from_slice(&vec![0i64; size]);
    let next = (rank + 1) % size;
    if size > 1 && rank > 0 {
        hvd_torch::recv_(&visited, rank - 1, 7)?;
    }
    let _ = visited.get(rank as i64).fill_(1);
    if size > 1 {
        hvd_torch::send(&visited, next, 7)?;
        if rank == 0 {
            hvd_torch::recv_(&visited, size - 1, 7)?;
            assert_eq!(visited.sum(tch::Kind::Int64).int64_value(&[]), size as i64);
        }
    }
    if size > 1 {
        // Everybody to the next at once: in the background, as no rank would come to receive otherwise.
        let (own, previous) = (Tensor::from(rank as i64), Tensor::from(-1i64));
        let sent = hvd_torch::send_async(&own, next, 8)?;
        hvd_torch::recv_async_(&previous, (rank + size - 1) % size, 8)?.wait()?;
        sent.wait()?;
        assert_eq!(previous.int64_value(&[]), ((rank + size - 1) % size) as i64);
    }
    if hvd_torch::is_main_process() {
        println!("{size} rank(s): the tensor has been everywhere");
    }
    hvd_torch::shutdown()?;
    Ok(())
}
