//! What `fuzz/` and the property tests throw at the messages of negotiation.

use smallvec::smallvec;

use super::message::{Announcement, BitSet, RoundMessage, SetName, Signature, SignatureKind, TensorSignature};
use crate::device::Device;
use crate::dtype::DType;

/// Ranks of the world.
const SIZE: usize = 5;

/// Reads `data` as two messages, of the length that the first byte gives and the rest, and merges them.
///
/// # Panics
/// If a merge depends on the order, or what was merged cannot travel on.
pub fn negotiation(data: &[u8]) {
    let (&at, data) = data.split_first().unwrap_or((&0, &[]));
    let (first, second) = data.split_at(usize::from(at).min(data.len()));
    let messages = [first, second].map(|bytes| RoundMessage::decode(bytes, SIZE));
    for message in messages.iter().flatten() {
        message.announced.values().for_each(|announcement| drop(announcement.describe(&[0, 1, 2])));
        let mut twice = message.clone();
        twice.merge(message.clone());
        check_travel(&twice);
    }
    if let [Ok(first), Ok(second)] = messages {
        let (mut one, mut other) = (first.clone(), second.clone());
        one.merge(second);
        other.merge(first);
        assert_eq!(one.closing, other.closing);
        assert_eq!(one.announced.keys().collect::<Vec<_>>(), other.announced.keys().collect::<Vec<_>>());
        check_travel(&one);
    }
}

/// Whether another rank takes what this one would send.
fn check_travel(message: &RoundMessage) {
    let bytes = message.encode().expect("a message can be encoded");
    assert_eq!(RoundMessage::decode(&bytes, SIZE).as_ref(), Ok(message));
}

/// Messages as ranks send them, for tests to spoil.
pub fn valid_negotiation() -> Vec<u8> {
    let tensors = smallvec![TensorSignature { dtype: DType::F32, shape: smallvec![3, 4], place: None }];
    let signature = Signature { kind: SignatureKind::Allgather, device: Device::Cpu, tensors };
    let message = |rank: usize| {
        let announcement = Announcement::new(rank, 7, signature.clone(), vec![rank as u64 + 1]);
        let astray = Announcement::astray(rank, SetName { number: 2, members: vec![0, rank] });
        let announced = [("a tensor".to_string(), announcement), ("another".to_string(), astray)].into();
        let (joined, founding) = (BitSet::of(1), [(vec![0, 1], BitSet::of(0))].into());
        let message = RoundMessage { ready: BitSet::of(70), announced, closing: false, tuned: None, joined, founding };
        message.encode().unwrap_or_default()
    };
    let (first, second) = (message(1), message(3));
    [&[first.len() as u8], &first[..], &second].concat()
}
