//! Flags of `horovodrun` that have no counterpart here.

use hvd_core::config::IGNORED;

/// What becomes of a job that is started with such a flag.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It runs as it would without, for this reason.
    Same(&'static str),
    /// As [`Fate::Same`], for the reason that this variable, which the flag would set, changes nothing.
    SameAs(&'static str),
    /// It would not be the job that was asked for; what to do instead.
    Refused(&'static str),
}

/// A flag, and how many values follow it.
pub struct Flag {
    name: &'static str,
    /// How many arguments after it are its values.
    pub values: usize,
    fate: Fate,
}

const ELASTIC: Fate = Fate::Refused(
    "there is no elastic membership: say how many ranks with -np and where with -H or --hostfile; a job that lost a rank is \
     started again from its checkpoint",
);

const FLAGS: &[Flag] = &[
    flag("--cycle-time-ms", 1, Fate::SameAs("HOROVOD_CYCLE_TIME")),
    flag("--autotune-gaussian-process-noise", 1, Fate::SameAs("HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE")),
    flag("--hierarchical-allgather", 0, Fate::SameAs("HOROVOD_HIERARCHICAL_ALLGATHER")),
    flag("--no-hierarchical-allgather", 0, Fate::SameAs("HOROVOD_HIERARCHICAL_ALLGATHER")),
    flag("--torus-allreduce", 0, Fate::SameAs("HOROVOD_TORUS_ALLREDUCE")),
    flag("--no-torus-allreduce", 0, Fate::SameAs("HOROVOD_TORUS_ALLREDUCE")),
    flag("--num-nccl-streams", 1, Fate::SameAs("HOROVOD_NUM_NCCL_STREAMS")),
    flag("--mpi-threads-disable", 0, Fate::SameAs("HOROVOD_MPI_THREADS_DISABLE")),
    flag("--no-mpi-threads-disable", 0, Fate::SameAs("HOROVOD_MPI_THREADS_DISABLE")),
    flag("--gloo-timeout-seconds", 1, Fate::SameAs("HOROVOD_GLOO_TIMEOUT_SECONDS")),
    flag("--gloo", 0, Fate::Same("hvdrun starts the ranks itself, and TCP takes Gloo's place")),
    flag("--tcp", 0, Fate::Same("hosts talk over TCP anyway")),
    flag("--mpi", 0, Fate::Same("hvdrun starts the ranks itself; under mpirun they use MPI between hosts")),
    flag("--mpi-args", 1, Fate::Refused("start the program with mpirun, and give them to it")),
    flag(
        "--binding-args",
        1,
        Fate::Refused("hvdrun binds no rank to cores; start the program with mpirun, which does"),
    ),
    flag("--jsrun", 0, Fate::Refused("LSF is not supported; name the hosts with -H or --hostfile")),
    flag("--min-np", 1, ELASTIC),
    flag("--min-num-proc", 1, ELASTIC),
    flag("--max-np", 1, ELASTIC),
    flag("--max-num-proc", 1, ELASTIC),
    flag("--slots-per-host", 1, ELASTIC),
    flag("--elastic-timeout", 1, ELASTIC),
    flag("--reset-limit", 1, ELASTIC),
    flag("--blacklist-cooldown-range", 2, ELASTIC),
    flag("--host-discovery-script", 1, ELASTIC),
];

const fn flag(name: &'static str, values: usize, fate: Fate) -> Flag {
    Flag { name, values, fate }
}

/// The flag of this name, without a value.
pub fn find(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}

impl Flag {
    /// What the user should know.
    ///
    /// # Errors
    /// That, where the job must not run.
    pub fn judge(&self) -> Result<String, String> {
        let same = |why: &str| Ok(format!("{} changes nothing: {why}", self.name));
        match self.fate {
            Fate::Same(why) => same(why),
            Fate::SameAs(variable) => {
                same(IGNORED.iter().find(|(name, _)| *name == variable).map_or("it has no counterpart", |(_, why)| why))
            }
            Fate::Refused(instead) => Err(format!("{} is not supported: {instead}", self.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variable_that_a_flag_is_like_is_known() {
        for flag in FLAGS {
            assert!(!flag.judge().is_ok_and(|text| text.contains("no counterpart")), "{}", flag.name);
        }
    }
}
