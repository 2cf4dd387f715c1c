//! Says what to install where MPI's compiler wrapper is missing.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=MPICC");
    println!("cargo:rerun-if-env-changed=PATH");
    let mpicc = std::env::var("MPICC").unwrap_or_else(|_| "mpicc".into());
    if let Err(error) = Command::new(&mpicc).arg("--version").output() {
        panic!(
            "\n\nThe MPI plugin needs MPI's compiler wrapper, and `{mpicc}` cannot be run: {error}.\n\
             On Debian or Ubuntu: apt-get install libopenmpi-dev openmpi-bin libclang-dev\n\
             Another MPI: set MPICC, for instance MPICC=mpicc.mpich with a target folder of its own.\n\
             Without MPI: cargo build --workspace --exclude hvd-mpi; all else works over TCP and shared memory.\n\n"
        );
    }
}
