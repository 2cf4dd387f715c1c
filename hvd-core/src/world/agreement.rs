//! What must be the same on all ranks, as each draws its conclusions from it alone: the build and some settings. Ranks that
//! differ refuse each other before they begin.

use std::time::Instant;

use crate::config::{AGREED, Config, KNOBS, TransportChoice};
use crate::error::{Error, Result};
use crate::transport::mpi;
use crate::transport::talk::Talk;
use crate::transport::{Tag, Transport};

/// The channel of these messages: "fact".
const CHANNEL: u32 = 0x6661_6374;
const FACTS: Tag = Tag { channel: CHANNEL, sequence: 0 };
const VERDICT: Tag = Tag { channel: CHANNEL, sequence: 1 };

/// Tells builds apart: a digest of this crate's sources.
const BUILD: &str = env!("BUILD_DIGEST");

/// What a rank goes by: names and values. This form never changes, as it is what builds tell each other.
type Facts = Vec<(String, String)>;

/// Refuses a world whose ranks differ; all ranks get the same error.
///
/// # Errors
/// [`Error::Config`] that says which ranks differ, and in what.
pub(super) fn agree(transport: &mut dyn Transport, config: &Config, deadline: Instant) -> Result<()> {
    let build = ("the build of hvd-core".to_string(), BUILD.to_string());
    let knobs = KNOBS.iter().filter(|knob| AGREED.contains(&knob.name));
    let settings = knobs.map(|knob| (knob.name.to_string(), (knob.show)(config)));
    let mpi = (config.transport == TransportChoice::Mpi).then(|| ("the MPI library".to_string(), mpi_library()));
    agree_on(transport, std::iter::once(build).chain(settings).chain(mpi).collect(), deadline)
}

/// The MPI that this rank would start, which waits for that of all others.
fn mpi_library() -> String {
    mpi::version().unwrap_or_else(|error| error.to_string())
}

fn agree_on(transport: &mut dyn Transport, own: Facts, deadline: Instant) -> Result<()> {
    let mut talk = Talk::new(transport, deadline, "compared their settings");
    let verdict = match talk.transport.rank() {
        0 => judge(&mut talk, &own)?,
        _ => {
            talk.tell(0, FACTS, &encode(&own)?)?;
            let verdict = talk.hear(0, VERDICT, || ())?;
            String::from_utf8_lossy(&verdict).into_owned()
        }
    };
    if verdict.is_empty() {
        return Ok(());
    }
    talk.part();
    Err(Error::Config(verdict))
}

/// Rank 0 compares all others with itself; gives what it tells them, nothing where all is well.
fn judge(talk: &mut Talk<'_>, own: &Facts) -> Result<String> {
    let mut verdict = String::new();
    for peer in 1..talk.transport.size() {
        let theirs = talk.hear(peer, FACTS, || ())?;
        if verdict.is_empty() {
            verdict = compare(own, &theirs, peer).unwrap_or_default();
        }
    }
    talk.tell_all(VERDICT, verdict.as_bytes())?;
    Ok(verdict)
}

/// The first difference, in words.
fn compare(own: &Facts, theirs: &[u8], peer: usize) -> Option<String> {
    let Ok(theirs) = postcard::from_bytes::<Facts>(theirs) else {
        return Some(format!("rank {peer} does not run the same build of hvd-core as rank 0; give all ranks the same"));
    };
    let lacking = ("nothing".to_string(), String::new());
    let all = own.iter().chain(theirs.iter().filter(|(name, _)| own.iter().all(|(known, _)| known != name)));
    let value = |facts: &Facts, name: &str| {
        let found = facts.iter().find(|(known, _)| known == name).unwrap_or(&lacking);
        found.1.clone()
    };
    all.map(|(name, _)| (name, value(own, name), value(&theirs, name))).find(|(_, ours, theirs)| ours != theirs).map(
        |(name, ours, theirs)| {
            format!("{name} is `{ours}` on rank 0 and `{theirs}` on rank {peer}; give all ranks the same")
        },
    )
}

fn encode(facts: &Facts) -> Result<Vec<u8>> {
    postcard::to_stdvec(facts).map_err(|error| Error::Invalid(format!("the settings cannot be encoded: {error}")))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::transport::thread::ThreadTransport;

    fn facts(pairs: &[(&str, &str)]) -> Facts {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    /// What each of three ranks hears if rank 2 goes by other facts.
    fn verdicts(usual: &[(&str, &str)], other: &[(&str, &str)]) -> Vec<Option<String>> {
        let run = |mut transport: ThreadTransport| {
            let own = facts(if transport.rank() == 2 { other } else { usual });
            let deadline = Instant::now() + Duration::from_secs(60);
            let refused = agree_on(&mut transport, own, deadline).err().map(|error| error.to_string());
            Talk::new(&mut transport, deadline, "part").part();
            refused
        };
        std::thread::scope(|scope| {
            let ranks = ThreadTransport::world(3).into_iter().map(|rank| scope.spawn(move || run(rank)));
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn the_same_facts_are_agreed_on() {
        assert_eq!(verdicts(&[("build", "a"), ("X", "1")], &[("build", "a"), ("X", "1")]), [None, None, None]);
    }

    #[test]
    fn a_difference_is_told_to_all_ranks() {
        let usual = [("build", "a"), ("X", "1")];
        for (other, expected) in [
            (vec![("build", "b"), ("X", "1")], "build is `a` on rank 0 and `b` on rank 2"),
            (vec![("build", "a"), ("X", "2")], "X is `1` on rank 0 and `2` on rank 2"),
            (vec![("build", "a")], "X is `1` on rank 0 and `` on rank 2"),
            (vec![("build", "a"), ("X", "1"), ("Y", "3")], "Y is `` on rank 0 and `3` on rank 2"),
        ] {
            for verdict in verdicts(&usual, &other) {
                assert!(verdict.as_ref().is_some_and(|text| text.contains(expected)), "{verdict:?}");
            }
        }
    }

    #[test]
    fn what_is_no_list_of_facts_is_another_build() {
        assert!(
            compare(&facts(&[]), &[0xff; 30], 7)
                .is_some_and(|text| text.contains("rank 7 does not run the same build"))
        );
    }
}
