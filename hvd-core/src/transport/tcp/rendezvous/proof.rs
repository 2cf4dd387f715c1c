//! Mutual proof that both ends of a connection know a key, without showing it.
//!
//! ```text
//! callee → caller   magic, nonce of the callee
//! caller → callee   claim (purpose, generation, both ranks), nonce of the caller, HMAC-SHA256 as caller
//! callee → caller   HMAC-SHA256 as callee, or zeros for a caller that does not know the key
//! ```
//!
//! Both codes cover the claim and both nonces, so nothing that was heard before helps; they differ by the role, so
//! nothing can be reflected. Nothing else is read or sent before. What follows on the connection is not encrypted:
//! use a network that is trusted not to alter traffic.

use std::io;
use std::time::Instant;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::random_bytes;
use super::stream::Stream;

pub(super) const MAGIC: [u8; 8] = *b"HVDauth1";
const CLAIM_BYTES: usize = 20;

/// A key for proofs. Not shown by `Debug`.
#[derive(Clone)]
pub(super) struct Key(Vec<u8>);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Meeting = 1,
    Mesh = 2,
    Heartbeat = 3,
}

/// Who calls whom, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) purpose: Purpose,
    pub(super) generation: u64,
    pub(super) caller: u32,
    pub(super) callee: u32,
}

#[derive(Clone, Copy)]
enum Role {
    Caller,
    Callee,
}

impl Key {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Key(bytes.to_vec())
    }

    /// A key for the mesh, from a secret that is not sent and random bytes that are.
    pub(super) fn derive(&self, seed: &[u8]) -> Key {
        let mut mac = self.mac();
        mac.update(b"hvd mesh key");
        mac.update(seed);
        Key(mac.finalize().into_bytes().to_vec())
    }

    fn code(&self, role: Role, claim: &[u8; CLAIM_BYTES], callee: &[u8; 32], caller: &[u8; 32]) -> Hmac<Sha256> {
        let mut mac = self.mac();
        mac.update(match role {
            Role::Caller => b"hvd caller",
            Role::Callee => b"hvd callee",
        });
        mac.update(claim);
        mac.update(callee);
        mac.update(caller);
        mac
    }

    fn mac(&self) -> Hmac<Sha256> {
        match Hmac::new_from_slice(&self.0) {
            Ok(mac) => mac,
            Err(_) => unreachable!("HMAC takes keys of any length"),
        }
    }
}

impl Purpose {
    fn from_number(number: u32) -> Option<Purpose> {
        [Purpose::Meeting, Purpose::Mesh, Purpose::Heartbeat].into_iter().find(|purpose| *purpose as u32 == number)
    }
}

impl Claim {
    fn encode(&self) -> [u8; CLAIM_BYTES] {
        let mut bytes = [0; CLAIM_BYTES];
        bytes[0..4].copy_from_slice(&(self.purpose as u32).to_le_bytes());
        bytes[4..12].copy_from_slice(&self.generation.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.caller.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.callee.to_le_bytes());
        bytes
    }

    /// Reads a claim; `None` for a purpose that does not exist.
    fn decode(bytes: &[u8; CLAIM_BYTES]) -> Option<Claim> {
        Some(Claim {
            purpose: Purpose::from_number(u32::from_le_bytes(array(&bytes[0..4])))?,
            generation: u64::from_le_bytes(array(&bytes[4..12])),
            caller: u32::from_le_bytes(array(&bytes[12..16])),
            callee: u32::from_le_bytes(array(&bytes[16..20])),
        })
    }
}

/// Proves the key and a claim to whom we called, and has it prove the key.
pub(super) fn as_caller(stream: &mut Stream, key: &Key, claim: Claim, deadline: Instant) -> io::Result<()> {
    let mut greeting = [0; 40];
    stream.read_exact_by(&mut greeting, deadline)?;
    if greeting[..8] != MAGIC {
        return Err(refusal("the other end does not speak this protocol"));
    }
    let theirs = array(&greeting[8..]);
    let ours = nonce()?;
    let claim = claim.encode();
    let mut answer = claim.to_vec();
    answer.extend(ours);
    answer.extend(key.code(Role::Caller, &claim, &theirs, &ours).finalize().into_bytes());
    stream.write_all_by(&answer, deadline)?;
    let mut code = [0; 32];
    stream.read_exact_by(&mut code, deadline)?;
    key.code(Role::Callee, &claim, &theirs, &ours)
        .verify_slice(&code)
        .map_err(|_| refusal("the other end does not know the secret"))
}

/// Has a caller prove the key and a claim that is `welcome`, and proves the key to it. Gives the claim.
pub(super) fn as_callee(
    stream: &mut Stream,
    key: &Key,
    welcome: impl Fn(&Claim) -> bool,
    deadline: Instant,
) -> io::Result<Claim> {
    let ours = nonce()?;
    let mut greeting = MAGIC.to_vec();
    greeting.extend(ours);
    stream.write_all_by(&greeting, deadline)?;
    let mut answer = [0; CLAIM_BYTES + 64];
    stream.read_exact_by(&mut answer, deadline)?;
    let claim = array::<CLAIM_BYTES>(&answer[..CLAIM_BYTES]);
    let theirs = array(&answer[CLAIM_BYTES..CLAIM_BYTES + 32]);
    let proved = key.code(Role::Caller, &claim, &ours, &theirs).verify_slice(&answer[CLAIM_BYTES + 32..]);
    if proved.is_err() {
        stream.write_all_by(&[0; 32], deadline)?;
        return Err(refusal("the caller does not know the secret"));
    }
    let code = key.code(Role::Callee, &claim, &ours, &theirs).finalize().into_bytes();
    let claim = Claim::decode(&claim).filter(welcome).ok_or_else(|| refusal("the caller wants something else"))?;
    stream.write_all_by(&code, deadline)?;
    Ok(claim)
}

fn nonce() -> io::Result<[u8; 32]> {
    random_bytes().map_err(io::Error::other)
}

fn refusal(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    const CLAIM: Claim = Claim { purpose: Purpose::Mesh, generation: 4, caller: 2, callee: 1 };

    fn is_welcome(claim: &Claim) -> bool {
        *claim == Claim { caller: claim.caller, ..CLAIM }
    }

    fn prove(caller: &str, callee: &str, claim: Claim) -> (io::Result<()>, io::Result<Claim>) {
        let (a, b) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let (caller, callee) = (Key::new(caller.as_bytes()), Key::new(callee.as_bytes()));
        std::thread::scope(|scope| {
            let called = scope.spawn(move || as_callee(&mut Stream::Unix(b), &callee, is_welcome, deadline));
            let calling = as_caller(&mut Stream::Unix(a), &caller, claim, deadline);
            (calling, called.join().unwrap())
        })
    }

    #[test]
    fn the_same_key_and_claim_pass() {
        let (caller, callee) = prove("key", "key", CLAIM);
        caller.unwrap();
        assert_eq!(callee.unwrap(), CLAIM);
        assert_eq!(prove("key", "key", Claim { caller: 5, ..CLAIM }).1.unwrap().caller, 5);
    }

    #[test]
    fn another_key_or_claim_does_not() {
        for (key, claim) in [
            ("other", CLAIM),
            ("key", Claim { purpose: Purpose::Meeting, ..CLAIM }),
            ("key", Claim { purpose: Purpose::Heartbeat, ..CLAIM }),
            ("key", Claim { generation: 5, ..CLAIM }),
            ("key", Claim { callee: 3, ..CLAIM }),
        ] {
            let (caller, callee) = prove(key, "key", claim);
            assert!(caller.is_err() && callee.is_err());
        }
    }

    /// Everything that a caller has said is said again; the fresh nonce makes it worthless.
    #[test]
    fn a_recording_is_worthless() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let key = Key::new(b"key");
        let mut recording = CLAIM.encode().to_vec();
        recording.extend([7; 32]);
        recording.extend(key.code(Role::Caller, &CLAIM.encode(), &[1; 32], &[7; 32]).finalize().into_bytes());
        let (mut thief, b) = UnixStream::pair().unwrap();
        io::Write::write_all(&mut thief, &recording).unwrap();
        assert!(as_callee(&mut Stream::Unix(b), &key, is_welcome, deadline).is_err());
    }

    /// A fake rank that answers a caller's code with the same code.
    #[test]
    fn a_reflection_is_worthless() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let (a, mut fake) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let caller = scope.spawn(move || as_caller(&mut Stream::Unix(a), &Key::new(b"key"), CLAIM, deadline));
            io::Write::write_all(&mut fake, &[MAGIC.as_slice(), &[0; 32]].concat()).unwrap();
            let mut answer = [0; CLAIM_BYTES + 64];
            io::Read::read_exact(&mut fake, &mut answer).unwrap();
            io::Write::write_all(&mut fake, &answer[CLAIM_BYTES + 32..]).unwrap();
            assert!(caller.join().unwrap().is_err());
        });
    }
}
