//! Messages from one rank to another: each gives what it has to the next one.
//!
//! `mpirun -np 2 target/release/examples/core_send_recv`

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
    if size > 1 {
        // A send is done once its receiver has begun, so a ring of blocking ones would wait for ever.
        let sending = world.send_async(next, 7, vec![rank as i32; rank + 1])?;
        let received = world.recv::<i32>(previous, 7)?;
        sending.wait()?;
        assert_eq!(received, vec![previous as i32; previous + 1]);
    }
    if rank == 0 {
        println!("{size} rank(s) over {}: each has what the one before had", world.backend());
    }
    hvd_core::shutdown()
}
