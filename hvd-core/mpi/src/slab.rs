//! Values under small numbers.

/// Values in slots that are used again.
pub(crate) struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Self {
        Slab { slots: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn insert(&mut self, value: T) -> i64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[index] = Some(value);
        index as i64
    }

    pub(crate) fn get(&mut self, key: i64) -> Result<&mut T, String> {
        let slot = usize::try_from(key).ok().and_then(|index| self.slots.get_mut(index));
        slot.and_then(Option::as_mut).ok_or_else(|| format!("there is no handle {key}"))
    }

    pub(crate) fn remove(&mut self, key: i64) -> Result<T, String> {
        self.get(key)?;
        let index = key as usize;
        self.free.push(index);
        self.slots[index].take().ok_or_else(|| format!("there is no handle {key}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_used_again() {
        let mut slab = Slab::new();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_eq!(slab.remove(a), Ok('a'));
        assert!(slab.get(a).is_err() && slab.get(-1).is_err() && slab.get(9).is_err());
        assert_eq!(slab.insert('c'), a);
        assert_eq!(slab.get(b), Ok(&mut 'b'));
    }
}
