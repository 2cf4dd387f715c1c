//! Random operations on each backend with several real processes, which check what they get and who served it.

use hvd_tests::{Job, Launcher, binary, mpi_plugin, seed};

const WORLD_SIZES: [usize; 4] = [2, 3, 5, 8];

fn conformance(ranks: usize, backend: &str) -> Job {
    let seed = seed().to_string();
    Job::new(binary("hvd-worker"), ranks).args(["conformance", "--expect-backend", backend, "--seed", &seed])
}

#[test]
fn one_process_is_a_world_of_its_own() {
    conformance(1, "solo").run().assert_success();
    for launcher in Launcher::available() {
        conformance(1, "solo").launcher(launcher).run().assert_success();
    }
}

#[test]
fn shared_memory_under_every_launcher() {
    for launcher in Launcher::available() {
        for ranks in WORLD_SIZES {
            conformance(ranks, "shm").launcher(launcher).run().assert_success();
        }
    }
}

#[test]
fn tcp() {
    for ranks in WORLD_SIZES {
        conformance(ranks, "tcp").var("HVD_SHM", 0).run().assert_success();
    }
    conformance(3, "tcp").var("HVD_SHM", 0).launcher(Launcher::OpenMpi).run().assert_success();
}

#[test]
fn tcp_with_a_rendezvous_address_and_a_secret() {
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let job = conformance(3, "tcp").var("HVD_SHM", 0);
    let job = job.var("HVD_RENDEZVOUS", format!("127.0.0.1:{port}")).var("HVD_SECRET", "only for this test");
    job.run().assert_success();
}

#[test]
fn mpi() {
    let Some(plugin) = mpi_plugin() else { return };
    for ranks in WORLD_SIZES {
        let job = conformance(ranks, "mpi").launcher(Launcher::OpenMpi);
        let job = job.var("HVD_SHM", 0).var("HVD_TRANSPORT", "mpi").var("HVD_MPI_PLUGIN", plugin.display());
        job.run().assert_success();
    }
}

#[test]
fn the_wrong_launcher_for_the_plugin_is_refused_with_an_explanation() {
    let (Some(plugin), true) = (mpi_plugin(), Launcher::Mpich.is_available()) else { return };
    let job = conformance(2, "mpi").launcher(Launcher::Mpich).var("HVD_TRANSPORT", "mpi");
    let finished = job.var("HVD_MPI_PLUGIN", plugin.display()).run();
    finished.assert_failure();
    assert!(finished.stderr.contains("mpirun"), "{}", finished.stderr);
}
