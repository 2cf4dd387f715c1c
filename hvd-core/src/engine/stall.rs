//! Complains of tensors that some ranks have submitted and others have not.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::config::Stall;

/// Names of tensors in one complaint.
const NAMES: usize = 8;

/// A tensor of this rank that has waited for long.
#[derive(Debug)]
pub struct Overdue {
    /// The tensor's name.
    pub name: String,
    /// For how long it has waited, as far as the inspector has seen.
    pub waited: Duration,
    /// The ranks that have not submitted it.
    pub missing: Vec<usize>,
    /// Whether this is the rank that complains of it, of all that wait.
    pub speaks: bool,
    /// That ranks of another process set wait for this one to submit a tensor of this name there, in words.
    pub astray: Option<String>,
}

/// When to look, and what to say. It looks only while something waits, and a few times in the time that is allowed.
pub struct StallInspector {
    warn_after: Duration,
    /// `None` for never.
    fail_after: Option<Duration>,
    disabled: bool,
    next_look: Option<Instant>,
    /// When each name was last complained of.
    said: BTreeMap<String, Instant>,
}

/// What the inspector concludes.
#[derive(Debug, PartialEq, Eq)]
pub enum Complaint {
    /// Nothing.
    None,
    /// Somebody should hear this.
    Warning(String),
    /// The world is to end with this.
    Failure(String),
}

impl StallInspector {
    /// As the settings say.
    pub fn new(settings: &Stall) -> Self {
        let fail_after = Some(settings.fail_after).filter(|time| !time.is_zero());
        let Stall { disabled, warn_after, .. } = *settings;
        StallInspector { warn_after, fail_after, disabled, next_look: None, said: BTreeMap::new() }
    }

    /// The age from which on a tensor matters, if it is time to look.
    pub fn look(&mut self, now: Instant) -> Option<Duration> {
        if self.disabled || self.next_look.is_some_and(|next| now < next) {
            return None;
        }
        let age = self.fail_after.map_or(self.warn_after, |fail_after| fail_after.min(self.warn_after));
        self.next_look = Some(now + (age / 8).clamp(Duration::from_millis(10), Duration::from_secs(10)));
        Some(age)
    }

    /// How long until the next look; `None` if there is none.
    pub fn pause(&self, now: Instant) -> Option<Duration> {
        (!self.disabled).then(|| self.next_look.map_or(Duration::ZERO, |next| next.saturating_duration_since(now)))
    }

    /// What to say of what is overdue.
    pub fn judge(&mut self, now: Instant, overdue: Vec<Overdue>) -> Complaint {
        self.said.retain(|name, _| overdue.iter().any(|tensor| tensor.name == *name));
        let too_late = |tensor: &&Overdue| self.fail_after.is_some_and(|fail_after| tensor.waited >= fail_after);
        let fatal: Vec<_> = overdue.iter().filter(too_late).collect();
        if !fatal.is_empty() {
            return Complaint::Failure(complaint(&fatal));
        }
        let warn_after = self.warn_after;
        let due = |tensor: &&Overdue| {
            let silent = self.said.get(&tensor.name).is_none_or(|&said| now.duration_since(said) >= warn_after);
            tensor.speaks && tensor.waited >= warn_after && silent
        };
        let due: Vec<_> = overdue.iter().filter(due).collect();
        if due.is_empty() {
            return Complaint::None;
        }
        self.said.extend(due.iter().map(|tensor| (tensor.name.clone(), now)));
        Complaint::Warning(complaint(&due))
    }
}

/// Which ranks lack which tensors.
fn complaint(overdue: &[&Overdue]) -> String {
    let mut by_missing: BTreeMap<&[usize], Vec<&Overdue>> = BTreeMap::new();
    overdue.iter().for_each(|tensor| by_missing.entry(&tensor.missing).or_default().push(tensor));
    let group = |(missing, mut tensors): (&[usize], Vec<&Overdue>)| {
        tensors.sort_by(|a, b| (b.waited, &a.name).cmp(&(a.waited, &b.name)));
        let ranks: Vec<_> = missing.iter().map(usize::to_string).collect();
        let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
        let named = tensors.iter().take(NAMES);
        let named: Vec<_> = named.map(|it| format!("`{}` ({:.0} s)", it.name, it.waited.as_secs_f64())).collect();
        let more = match tensors.len().saturating_sub(NAMES) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("{noun} {} did not submit {}{more}", ranks.join(", "), named.join(", "))
    };
    let groups: Vec<_> = by_missing.into_iter().map(group).collect();
    let astray = overdue.iter().filter_map(|tensor| tensor.astray.clone());
    let parts: Vec<_> = groups.into_iter().chain(astray).collect();
    format!(
        "stalled: {}. All ranks must submit the same tensors; see whether one of them took another way through the \
         program, chose another process set, or is slow",
        parts.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overdue(name: &str, waited: u64, missing: &[usize]) -> Overdue {
        let (waited, missing) = (Duration::from_secs(waited), missing.into());
        Overdue { name: name.into(), waited, missing, speaks: true, astray: None }
    }

    fn inspector(warn_after: u64, fail_after: u64) -> StallInspector {
        let [warn_after, fail_after] = [warn_after, fail_after].map(Duration::from_secs);
        StallInspector::new(&Stall { disabled: false, warn_after, fail_after })
    }

    #[test]
    fn a_warning_is_repeated_only_after_the_same_time_again() {
        let mut inspector = inspector(60, 0);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(inspector.judge(start, vec![overdue("a", 59, &[1])]), Complaint::None);
        let Complaint::Warning(text) = inspector.judge(start, vec![overdue("a", 60, &[1, 3])]) else { panic!() };
        assert!(text.starts_with("stalled: ranks 1, 3 did not submit `a` (60 s)."), "{text}");
        assert_eq!(inspector.judge(at(59), vec![overdue("a", 119, &[1, 3])]), Complaint::None);
        assert!(matches!(inspector.judge(at(60), vec![overdue("a", 120, &[1, 3])]), Complaint::Warning(_)));
        let silent = Overdue { speaks: false, ..overdue("b", 70, &[1]) };
        assert_eq!(inspector.judge(at(61), vec![silent]), Complaint::None);
    }

    #[test]
    fn a_rank_that_is_wanted_in_another_set_is_told_of_it() {
        let tensor = Overdue { astray: Some("rank 2 went astray".into()), ..overdue("a", 60, &[1]) };
        let Complaint::Warning(text) = inspector(60, 0).judge(Instant::now(), vec![tensor]) else { panic!() };
        assert!(text.contains("rank 1 did not submit `a` (60 s); rank 2 went astray."), "{text}");
    }

    #[test]
    fn many_tensors_make_one_complaint() {
        let mut inspector = inspector(10, 20);
        let mut many: Vec<_> = (0..20).map(|i| overdue(&format!("t{i:02}"), 10, &[2])).collect();
        many.push(overdue("other", 11, &[0, 1]));
        let Complaint::Warning(text) = inspector.judge(Instant::now(), many) else { panic!() };
        assert!(
            text.contains("ranks 0, 1 did not submit `other` (11 s); rank 2 did not submit `t00` (10 s)"),
            "{text}"
        );
        assert!(text.contains("`t07` (10 s) and 12 more"), "{text}");
        let failure = inspector.judge(Instant::now(), vec![overdue("a", 20, &[1])]);
        assert!(matches!(failure, Complaint::Failure(_)), "{failure:?}");
    }
}
