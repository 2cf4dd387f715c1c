//! Whatever is taken for a token shard is read without harm, and written again as it was.
#![no_main]

use lm_formats::shard::{HEADER_BYTES, Header};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    read(data);
    // Nobody guesses a checksum: once more with the right one.
    if data.len() >= HEADER_BYTES {
        let mut file = data.to_vec();
        let checksum = crc32fast::hash(&file[..HEADER_BYTES - 4]);
        file[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        read(&file);
    }
});

fn read(file: &[u8]) {
    let Ok(header) = Header::decode(file) else { return };
    let _ = header.verify(file);
    let held = header.tokens;
    for (start, len) in [(0, held as usize), (held / 2, 1), (held, 1), (1, usize::MAX), (u64::MAX, 1)] {
        let mut tokens = Vec::new();
        if header.read(file, start, len, &mut tokens).is_ok() {
            assert_eq!(tokens.len(), len);
            assert!(tokens.iter().all(|token| (0..header.vocab_size as i64).contains(token)));
        }
    }
    let written = [&header.encode()[..], &file[HEADER_BYTES..]].concat();
    assert_eq!(Header::decode(&written), Ok(header));
}
