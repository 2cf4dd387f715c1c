//! Everything that reads bytes or texts from outside, as functions of bytes, for the fuzzer (`fuzz/`) and for the property
//! tests below, which spoil valid input. Each panics where something is wrong.

use std::collections::BTreeMap;

use crate::config::{Config, KNOBS, OTHERS, remarks};
use crate::topology::{Launch, Vars};

pub use crate::engine::fuzzing::{negotiation, valid_negotiation};
pub use crate::transport::tcp::fuzzing::{frames, valid_frames};
pub use crate::transport::tcp::rendezvous::fuzzing::{handshake, valid_handshakes};
pub use crate::world::objects::decode;

/// Variables of the launchers, beside our own.
const LAUNCHERS: &[&str] = &[
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMIX_NAMESPACE",
    "OMPI_MCA_orte_hnp_uri",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_NTASKS",
    "SLURM_TASKS_PER_NODE",
];

/// Reads `data` as an object that a peer has sent.
pub fn objects(data: &[u8]) {
    type Nested = BTreeMap<String, Vec<(Option<u64>, f64, Result<String, char>)>>;
    let _ = decode::<Nested>("an object", data);
    let _ = decode::<Vec<Vec<Vec<u8>>>>("an object", data);
}

/// Reads lines, of which the first byte chooses a variable and the rest is its value, as an environment.
///
/// # Panics
/// If a place among ranks is accepted that cannot be.
pub fn environment(data: &[u8]) {
    let names: Vec<_> = KNOBS.iter().map(|knob| knob.name).chain(OTHERS.iter().chain(LAUNCHERS).copied()).collect();
    let text = String::from_utf8_lossy(data);
    let variable = |line: &str| {
        let mut letters = line.chars();
        let name = names[letters.next()? as usize % names.len()];
        Some((name.to_string(), letters.as_str().to_string()))
    };
    let vars: Vars = text.lines().filter_map(variable).collect();
    drop(remarks(&vars));
    let _ = Config::from_vars(&vars);
    if let Ok(launch) = Launch::from_vars(&vars, 1) {
        let place = launch.topology;
        assert!(place.rank < place.size && place.local_rank < place.local_size && place.local_size <= place.size);
        assert!(place.cross_rank < place.cross_size);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// One way to spoil bytes.
    #[derive(Clone, Debug)]
    enum Spoil {
        Set(Index, u8),
        Insert(Index, Vec<u8>),
        Cut(Index),
        Repeat(Index, Index),
    }

    fn spoil() -> impl Strategy<Value = Spoil> {
        prop_oneof![
            4 => (any::<Index>(), any::<u8>()).prop_map(|(at, value)| Spoil::Set(at, value)),
            1 => (any::<Index>(), proptest::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, new)| Spoil::Insert(at, new)),
            1 => any::<Index>().prop_map(Spoil::Cut),
            1 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Spoil::Repeat(from, to)),
        ]
    }

    fn spoiled(mut bytes: Vec<u8>, ways: &[Spoil]) -> Vec<u8> {
        for way in ways {
            let at = |index: &Index| index.index(bytes.len() + 1);
            match way {
                Spoil::Set(index, value) => {
                    let at = at(index).min(bytes.len().saturating_sub(1));
                    bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = *value);
                }
                Spoil::Insert(index, new) => {
                    let at = at(index);
                    drop(bytes.splice(at..at, new.iter().copied()));
                }
                Spoil::Cut(index) => bytes.truncate(at(index)),
                Spoil::Repeat(one, other) => {
                    let (from, to) = (at(one).min(at(other)), at(one).max(at(other)));
                    bytes.extend_from_within(from..to.min(from + 4096));
                }
            }
        }
        bytes
    }

    #[test]
    fn what_is_spoiled_here_was_valid() {
        frames(&valid_frames());
        negotiation(&valid_negotiation());
        valid_handshakes().iter().for_each(|bytes| handshake(bytes));
        environment(b"\x1c1\n\x1d4\n");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn spoiled_frames_do_no_harm(ways in proptest::collection::vec(spoil(), 1..6)) {
            frames(&spoiled(valid_frames(), &ways));
        }

        #[test]
        fn spoiled_handshakes_do_no_harm(which in 0..3usize, ways in proptest::collection::vec(spoil(), 0..6)) {
            handshake(&spoiled(valid_handshakes().swap_remove(which), &ways));
        }

        #[test]
        fn spoiled_negotiation_does_no_harm(ways in proptest::collection::vec(spoil(), 1..6)) {
            negotiation(&spoiled(valid_negotiation(), &ways));
        }

        #[test]
        fn spoiled_objects_do_no_harm(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            objects(&data);
        }

        #[test]
        fn any_environment_does_no_harm(lines in proptest::collection::vec("[\u{0}-\u{60}](-?[0-9]{1,20}|[^\n]{0,9}|[0-9]\\(x[0-9]{1,7}\\))", 0..12)) {
            environment(lines.join("\n").as_bytes());
        }
    }
}
