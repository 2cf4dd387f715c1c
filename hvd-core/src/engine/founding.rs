//! Process sets in the making, as all ranks of the world know them.
//!
//! A rank says in a round of the world's negotiation which set it makes; all hear it, members or not. So the sets have one
//! order and one number each on all ranks, although only their members ask for them.

use std::collections::{BTreeMap, BTreeSet};

use super::message::BitSet;

/// Ranks of the world, ascending.
pub type Members = Vec<usize>;

/// What comes of the sets in the making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foundation {
    /// All members have asked for it.
    Made {
        /// The members.
        members: Members,
        /// The set's number, which no other set of the world ever has.
        number: u32,
    },
    /// Some ranks wait for each other in different sets.
    Refused {
        /// The set.
        members: Members,
        /// The ranks that are to hear of it.
        ranks: BitSet,
        /// Which ranks make which sets; the same text on every rank.
        detail: String,
    },
}

/// The sets in the making. A rank makes one at a time, so ranks that wait for each other in different sets wait forever.
#[derive(Default)]
pub struct Founding {
    /// The ranks that have asked for each set.
    asked: BTreeMap<Members, BitSet>,
    /// How many sets have been made.
    made: u32,
    /// Sets that were refused before these ranks, too, had asked for them.
    owed: BTreeMap<Members, (BitSet, String)>,
}

impl Founding {
    /// Takes in what ranks have asked for in one round; what comes of it, in an order that is the same on all ranks.
    pub fn conclude(&mut self, asked: BTreeMap<Members, BitSet>) -> Vec<Foundation> {
        let mut foundations = Vec::new();
        for (members, ranks) in asked {
            match self.collect_debt(&members, &ranks) {
                Some(detail) => foundations.push(Foundation::Refused { members, ranks, detail }),
                None => self.asked.entry(members).or_default().union(&ranks),
            }
        }
        foundations.extend(self.take_complete());
        foundations.extend(self.refuse_deadlocked());
        foundations
    }

    /// The reason if the set was refused before these ranks asked for it. A rank that asks anew begins anew.
    fn collect_debt(&mut self, members: &Members, ranks: &BitSet) -> Option<String> {
        let (late, detail) = self.owed.get_mut(members)?;
        if !ranks.iter().all(|rank| late.contains(rank)) {
            self.owed.remove(members);
            return None;
        }
        let detail = detail.clone();
        let left: Vec<_> = late.iter().filter(|&rank| !ranks.contains(rank)).collect();
        match left.is_empty() {
            true => drop(self.owed.remove(members)),
            false => *late = left.into_iter().collect(),
        }
        Some(detail)
    }

    fn take_complete(&mut self) -> Vec<Foundation> {
        let complete = |(members, ranks): (&Members, &BitSet)| ranks.count() == members.len();
        let taken: Vec<_> =
            self.asked.iter().filter(|&entry| complete(entry)).map(|(members, _)| members.clone()).collect();
        let make = |members: Members| {
            self.asked.remove(&members);
            self.made += 1;
            Foundation::Made { members, number: self.made }
        };
        taken.into_iter().map(make).collect()
    }

    /// Refuses the sets of ranks that wait for each other in a circle.
    fn refuse_deadlocked(&mut self) -> Vec<Foundation> {
        let sets = self.asked.iter().flat_map(|(members, ranks)| ranks.iter().map(move |rank| (rank, members)));
        let waits: BTreeMap<usize, &Members> = sets.collect();
        let stuck: BTreeSet<usize> = waits.keys().copied().filter(|&rank| waits_for_itself(rank, &waits)).collect();
        if stuck.is_empty() {
            return Vec::new();
        }
        let sets: BTreeSet<Members> = stuck.iter().map(|rank| waits[rank].clone()).collect();
        let detail = describe(&self.asked, &sets);
        sets.into_iter().map(|members| self.refuse(members, &stuck, &detail)).collect()
    }

    fn refuse(&mut self, members: Members, stuck: &BTreeSet<usize>, detail: &str) -> Foundation {
        let ranks = self.asked.remove(&members).unwrap_or_default();
        let late: BitSet =
            members.iter().copied().filter(|rank| !ranks.contains(*rank) && !stuck.contains(rank)).collect();
        if late.count() > 0 {
            self.owed.insert(members.clone(), (late, detail.to_string()));
        }
        Foundation::Refused { members, ranks, detail: detail.to_string() }
    }
}

/// Whether a rank's wait for the others of its set comes round to itself.
fn waits_for_itself(rank: usize, waits: &BTreeMap<usize, &Members>) -> bool {
    let waited_for = |rank: usize| {
        let own = waits.get(&rank).copied();
        let others = own.into_iter().flatten().copied();
        others.filter(move |other| waits.get(other).is_some_and(|&theirs| Some(theirs) != own))
    };
    let mut seen = BTreeSet::new();
    let mut next: Vec<_> = waited_for(rank).collect();
    while let Some(other) = next.pop() {
        if other == rank {
            return true;
        }
        if seen.insert(other) {
            next.extend(waited_for(other));
        }
    }
    false
}

fn describe(asked: &BTreeMap<Members, BitSet>, sets: &BTreeSet<Members>) -> String {
    let line = |members: &Members| {
        let ranks: Vec<_> =
            asked.get(members).map(|ranks| ranks.iter().map(|rank| rank.to_string()).collect()).unwrap_or_default();
        let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
        let verb = if ranks.len() == 1 { "makes" } else { "make" };
        format!("{noun} {} {verb} the set {members:?}", ranks.join(", "))
    };
    sets.iter().map(line).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(founding: &mut Founding, asked: &[(usize, &[usize])]) -> Vec<Foundation> {
        let mut sets = BTreeMap::<Members, BitSet>::new();
        asked.iter().for_each(|(rank, members)| sets.entry(members.to_vec()).or_default().insert(*rank));
        founding.conclude(sets)
    }

    fn refused<'a>(foundations: &'a [Foundation]) -> Vec<(&'a [usize], Vec<usize>)> {
        let of = |foundation: &'a Foundation| match foundation {
            Foundation::Refused { members, ranks, .. } => (&members[..], ranks.iter().collect()),
            Foundation::Made { members, .. } => panic!("{members:?} was made"),
        };
        foundations.iter().map(of).collect()
    }

    #[test]
    fn a_set_is_made_when_its_last_member_asks() {
        let mut founding = Founding::default();
        assert_eq!(ask(&mut founding, &[(0, &[0, 2]), (1, &[1, 3])]), []);
        let made = |members: &[usize], number| Foundation::Made { members: members.into(), number };
        assert_eq!(ask(&mut founding, &[(3, &[1, 3])]), [made(&[1, 3], 1)]);
        assert_eq!(ask(&mut founding, &[(2, &[0, 2])]), [made(&[0, 2], 2)]);
        assert_eq!(ask(&mut founding, &[(0, &[0, 2]), (2, &[0, 2])]), [made(&[0, 2], 3)]);
    }

    #[test]
    fn ranks_that_wait_for_each_other_hear_of_it() {
        let mut founding = Founding::default();
        assert_eq!(ask(&mut founding, &[(0, &[0, 1])]), []);
        let foundations = ask(&mut founding, &[(1, &[0, 1, 2])]);
        assert_eq!(refused(&foundations), [(&[0, 1][..], vec![0]), (&[0, 1, 2], vec![1])]);
        let text = "rank 0 makes the set [0, 1]; rank 1 makes the set [0, 1, 2]";
        assert!(matches!(&foundations[0], Foundation::Refused { detail, .. } if detail == text), "{foundations:?}");
        // Rank 2 is late, and hears of it as well; then all may try again.
        assert_eq!(refused(&ask(&mut founding, &[(2, &[0, 1, 2])])), [(&[0, 1, 2][..], vec![2])]);
        assert_eq!(ask(&mut founding, &[(0, &[0, 1, 2]), (2, &[0, 1, 2])]), []);
        assert_eq!(ask(&mut founding, &[(1, &[0, 1, 2])]).len(), 1);
    }

    #[test]
    fn a_circle_of_three_is_found_and_who_only_waits_for_it_is_left_alone() {
        let mut founding = Founding::default();
        assert_eq!(ask(&mut founding, &[(3, &[0, 3]), (0, &[0, 1]), (1, &[1, 2])]), []);
        let foundations = ask(&mut founding, &[(2, &[0, 2])]);
        assert_eq!(refused(&foundations), [(&[0, 1][..], vec![0]), (&[0, 2], vec![2]), (&[1, 2], vec![1])]);
        assert_eq!(ask(&mut founding, &[(0, &[0, 3])]).len(), 1);
    }
}
