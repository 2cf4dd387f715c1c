//! Agreements of the past, so that a repeated tensor is negotiated with one bit.

use std::collections::HashMap;
use std::sync::Arc;

use super::message::Signature;

/// A tensor or group on which all ranks agreed.
#[derive(Clone, Debug)]
pub struct Agreement {
    /// Its name.
    pub name: String,
    /// What all ranks sent.
    pub signature: Signature,
    /// Of an allgather, each rank's first dimension of each tensor; else empty.
    pub first_dims: Vec<Vec<u64>>,
}

struct Slot {
    agreement: Arc<Agreement>,
    last_used: u64,
}

/// A least-recently-used cache of [`Agreement`]s.
///
/// All ranks make the same calls in the same order, so that a slot's number means the same tensor on all of them.
pub struct ResponseCache {
    slots: Vec<Option<Slot>>,
    by_name: HashMap<String, usize>,
    capacity: usize,
    clock: u64,
}

impl ResponseCache {
    /// An empty cache for up to `capacity` tensors.
    pub fn new(capacity: usize) -> Self {
        ResponseCache { slots: Vec::new(), by_name: HashMap::new(), capacity, clock: 0 }
    }

    /// The slot of a tensor of which this rank submits exactly what was agreed on.
    pub fn find(&self, name: &str, signature: &Signature, rank: usize, first_dims: &[u64]) -> Option<usize> {
        let slot = *self.by_name.get(name)?;
        let agreement = self.get(slot)?;
        let agreed_dims = agreement.first_dims.get(rank).map_or(&[][..], Vec::as_slice);
        let same = agreement.signature == *signature && agreed_dims == first_dims;
        same.then_some(slot)
    }

    /// What was agreed on in a slot.
    pub fn get(&self, slot: usize) -> Option<&Arc<Agreement>> {
        self.slots.get(slot)?.as_ref().map(|slot| &slot.agreement)
    }

    /// The slots of agreements that do not depend on each rank's rows.
    pub fn slots_without_rows(&self) -> impl Iterator<Item = usize> + '_ {
        let rowless = |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| slot.agreement.first_dims.is_empty());
        (0..self.slots.len()).filter(move |&at| rowless(&self.slots[at]))
    }

    /// The names of agreements that depend on each rank's rows, in an order that is the same on all ranks.
    pub fn names_with_rows(&self) -> Vec<String> {
        let agreements = self.slots.iter().flatten().map(|slot| &slot.agreement);
        agreements
            .filter(|agreement| !agreement.first_dims.is_empty())
            .map(|agreement| agreement.name.clone())
            .collect()
    }

    /// Notes that a slot was used.
    pub fn touch(&mut self, slot: usize) {
        self.clock += 1;
        if let Some(Some(slot)) = self.slots.get_mut(slot) {
            slot.last_used = self.clock;
        }
    }

    /// Remembers an agreement. Gives the one that had to go for it.
    pub fn insert(&mut self, agreement: Arc<Agreement>) -> Option<Arc<Agreement>> {
        if self.capacity == 0 {
            return None;
        }
        let (slot, evicted) = self.free_slot();
        self.clock += 1;
        self.by_name.insert(agreement.name.clone(), slot);
        self.slots[slot] = Some(Slot { agreement, last_used: self.clock });
        evicted
    }

    /// Forgets a name. Gives whether it was known.
    pub fn remove(&mut self, name: &str) -> bool {
        let slot = self.by_name.remove(name);
        if let Some(slot) = slot {
            self.slots[slot] = None;
        }
        slot.is_some()
    }

    fn free_slot(&mut self) -> (usize, Option<Arc<Agreement>>) {
        if let Some(free) = self.slots.iter().position(Option::is_none) {
            return (free, None);
        }
        if self.slots.len() < self.capacity {
            self.slots.push(None);
            return (self.slots.len() - 1, None);
        }
        let age = |slot: &Option<Slot>| slot.as_ref().map_or(0, |slot| slot.last_used);
        let oldest = (0..self.slots.len()).min_by_key(|&slot| age(&self.slots[slot])).unwrap_or(0);
        let evicted = self.slots[oldest].take().map(|slot| slot.agreement);
        if let Some(agreement) = &evicted {
            self.by_name.remove(&agreement.name);
        }
        (oldest, evicted)
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;
    use crate::engine::message::{SignatureKind, TensorSignature};

    fn agreement(name: &str) -> Arc<Agreement> {
        let tensors = smallvec![TensorSignature { dtype: DType::F32, shape: smallvec![2], place: None }];
        let signature = Signature { kind: SignatureKind::Allgather, device: Device::Cpu, tensors };
        Arc::new(Agreement { name: name.into(), signature, first_dims: vec![vec![4], vec![5]] })
    }

    #[test]
    fn a_hit_needs_the_same_name_signature_and_first_dimension() {
        let mut cache = ResponseCache::new(4);
        let a = agreement("a");
        assert!(cache.insert(a.clone()).is_none());
        assert_eq!(cache.find("a", &a.signature, 0, &[4]), Some(0));
        assert_eq!(cache.find("a", &a.signature, 1, &[4]), None);
        assert_eq!(cache.find("b", &a.signature, 0, &[4]), None);
        let other = Signature { device: Device::Cuda, ..a.signature.clone() };
        assert_eq!(cache.find("a", &other, 0, &[4]), None);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut cache = ResponseCache::new(2);
        cache.insert(agreement("a"));
        cache.insert(agreement("b"));
        cache.touch(0);
        let name = |agreement: Option<Arc<Agreement>>| agreement.map(|agreement| agreement.name.clone());
        assert_eq!(name(cache.insert(agreement("c"))).as_deref(), Some("b"));
        assert_eq!(cache.get(1).map(|agreement| agreement.name.as_str()), Some("c"));
        assert!(cache.remove("a") && !cache.remove("a"));
        assert_eq!(name(cache.insert(agreement("d"))), None);
        assert_eq!(name(cache.insert(agreement("e"))).as_deref(), Some("c"));
    }

    #[test]
    fn no_capacity_means_no_cache() {
        let mut cache = ResponseCache::new(0);
        assert!(cache.insert(agreement("a")).is_none());
        assert!(cache.get(0).is_none());
    }
}
