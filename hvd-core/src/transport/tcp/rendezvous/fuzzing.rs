//! What `fuzz/` and the property tests throw at the proof and at the notes.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::note::Note;
use super::proof::{self, Claim, Key, Purpose};
use super::stream::Stream;

/// Fits into the buffer of a socket, so that one thread can do it all.
const MOST_BYTES: usize = 16 << 10;

/// Speaks `data` to a rank that waits for a proof, to one that gives one, and to one that waits for a note.
///
/// # Panics
/// If bytes that know no secret are believed.
pub fn handshake(data: &[u8]) {
    let key = Key::new(b"a key that nobody can guess");
    let claim = Claim { purpose: Purpose::Mesh, generation: 0, caller: 1, callee: 0 };
    let believed = [
        listen_to(data, |stream, deadline| proof::as_callee(stream, &key, |_| true, deadline).is_ok()),
        listen_to(data, |stream, deadline| proof::as_caller(stream, &key, claim, deadline).is_ok()),
    ];
    assert_eq!(believed, [false, false]);
    listen_to(data, |stream, deadline| Note::receive(stream, deadline).is_ok());
}

/// What a rank makes of `data` and the end of the connection.
fn listen_to(data: &[u8], hear: impl FnOnce(&mut Stream, Instant) -> bool) -> bool {
    let Ok((near, mut far)) = UnixStream::pair() else { return false };
    let sent = far.write_all(&data[..data.len().min(MOST_BYTES)]).and_then(|()| far.shutdown(Shutdown::Write));
    sent.is_ok() && hear(&mut Stream::Unix(near), Instant::now() + Duration::from_secs(10))
}

/// What a caller and rank 0 may well say, for tests to spoil.
pub fn valid_handshakes() -> Vec<Vec<u8>> {
    let roster = Note::Roster { addresses: vec![([127, 0, 0, 1], 1).into(); 3], seed: [3; 32] };
    let note = |note: &Note| {
        let body = postcard::to_stdvec(note).unwrap_or_default();
        [&(body.len() as u32).to_le_bytes(), &body[..]].concat()
    };
    let recorded = [&proof::MAGIC[..], &[9; 200]].concat();
    vec![note(&roster), note(&Note::Failed { text: "because".into() }), recorded]
}
