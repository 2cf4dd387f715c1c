//! How a job ended: who failed first, and what `hvdrun` ends with.

use std::collections::BTreeMap;

use hvd_core::topology::listed;

use super::message::End;

/// Exit code for wrong usage.
pub const USAGE: u8 = 2;
/// Exit code for failures of `hvdrun` itself.
pub const OWN_FAILURE: u8 = 125;
/// Exit code for a program that cannot be run.
pub const NOT_RUNNABLE: u8 = 126;
/// Exit code for a program that is not there.
pub const NOT_FOUND: u8 = 127;

impl End {
    /// Whether the process did what it should.
    pub fn is_success(self) -> bool {
        self == End::Code(0)
    }

    /// As a shell's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            End::Code(code) => u8::try_from(code).unwrap_or(OWN_FAILURE),
            End::Signal(number) => signal_code(number),
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Code(code) => write!(f, "exit code {code}"),
            End::Signal(number) => write!(f, "killed by {}", signal_name(*number)),
        }
    }
}

/// The exit code of what a signal has ended.
pub fn signal_code(number: i32) -> u8 {
    128u8.saturating_add(u8::try_from(number).unwrap_or(0))
}

/// `SIGKILL (9)`.
pub fn signal_name(number: i32) -> String {
    match signal_hook::low_level::signal_name(number) {
        Some(name) => format!("{name} ({number})"),
        None => format!("signal {number}"),
    }
}

/// The ends of the ranks in the order in which they became known.
#[derive(Default)]
pub struct Ends(Vec<(usize, End)>);

impl Ends {
    /// Notes an end.
    pub fn push(&mut self, rank: usize, end: End) {
        self.0.push((rank, end));
    }

    /// Whether a rank has ended.
    pub fn contains(&self, rank: usize) -> bool {
        self.0.iter().any(|(other, _)| *other == rank)
    }

    /// The rank that failed first. One whose last words are that it lost another rank, which failed as well, is not it: the
    /// news of the end of both may have come in either order.
    pub fn first_failure(&self, last_words: impl Fn(usize) -> String) -> Option<(usize, End)> {
        let failed: Vec<_> = self.0.iter().filter(|(_, end)| !end.is_success()).copied().collect();
        let only_followed = |rank: usize| {
            let first = first_to_end(&last_words(rank));
            first.is_some_and(|first| first != rank && failed.iter().any(|(other, _)| *other == first))
        };
        let cause = failed.iter().find(|(rank, _)| !only_followed(*rank));
        cause.or(failed.first()).copied()
    }

    /// How the ranks but `first` ended that failed, in groups.
    pub fn followers(&self, first: usize) -> Vec<String> {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (rank, end) in self.0.iter().filter(|(rank, end)| *rank != first && !end.is_success()) {
            groups.entry(end.to_string()).or_default().push(*rank);
        }
        groups.into_iter().map(|(end, ranks)| format!("{}: {end}", listed(ranks))).collect()
    }
}

/// The rank that the runtime says to have lost, or that has ended the job.
fn first_to_end(text: &str) -> Option<usize> {
    let gave_up = || text.split_once(" ended the job: ")?.0.rsplit_once("rank ")?.1.parse().ok();
    let Some((_, rest)) = text.split_once("lost rank ") else { return gave_up() };
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(all: &[(usize, End)]) -> Ends {
        let mut ends = Ends::default();
        all.iter().for_each(|(rank, end)| ends.push(*rank, *end));
        ends
    }

    #[test]
    fn the_first_to_fail_is_the_one_that_others_lost() {
        let all = ends(&[(3, End::Code(0)), (0, End::Code(1)), (2, End::Signal(9)), (1, End::Code(1))]);
        let words =
            |rank: usize| if rank == 2 { String::new() } else { "error: lost rank 2: connection closed".into() };
        assert_eq!(all.first_failure(words), Some((2, End::Signal(9))));
        assert_eq!(all.first_failure(|_| String::new()), Some((0, End::Code(1))));
        assert_eq!(all.first_failure(|_| "lost rank 7".into()), Some((0, End::Code(1))));
        assert_eq!(all.first_failure(|rank| format!("lost rank {}", (rank + 1) % 3)), Some((0, End::Code(1))));
        let told = |rank: usize| {
            if rank == 1 { "stalled: …".into() } else { "Error: rank 1 ended the job: stalled: …".into() }
        };
        assert_eq!(all.first_failure(told), Some((1, End::Code(1))));
        assert_eq!(all.followers(2), ["ranks 0-1: exit code 1"]);
        assert_eq!(ends(&[(0, End::Code(0))]).first_failure(words), None);
    }

    #[test]
    fn ends_have_codes_and_names() {
        assert_eq!((End::Code(3).exit_code(), End::Signal(9).exit_code(), End::Code(-1).exit_code()), (3, 137, 125));
        assert_eq!(End::Signal(9).to_string(), "killed by SIGKILL (9)");
        assert_eq!(End::Signal(40).to_string(), "killed by signal 40");
    }
}
