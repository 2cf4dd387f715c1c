//! A checkpoint's `state.json`, and the file format of its tensors up to where libtorch copies them.
#![no_main]

use lm_formats::state::CheckpointState;
use safetensors::SafeTensors;

const STATE: &[u8] =
    br#"{"format_version":1,"epoch":2,"step":3,"global_step":23,"loss":1.5,"best_val_loss":null,"seed":42,
"global_batch_size":8,"batches_per_epoch":10,"world_size":2,"wall_time":1.25,"scaler":{"scale":2.0,"good_steps":1},
"guard":{"skipped":1,"in_a_row":0,"losses":[1.0],"norms":[]},"validations_since_best":0,
"files":{"model.safetensors":"ab","optimizer.safetensors":"cd","config.yaml":"ef"}}"#;

const HEADER: &[u8] = br#"{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[1],
"data_offsets":[8,10]}}"#;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let whole = [&(HEADER.len() as u64).to_le_bytes()[..], HEADER, b"abcdefghij"].concat();
    // Nobody guesses the names of all fields: once more as edits of what is right.
    let states = [state(data), state(&edited(STATE, data))];
    let files = [weights(data), weights(&edited(&whole, data))];
    if data.is_empty() {
        assert_eq!((states, files), ([false, true], [false, true]));
    }
});

/// `base` with a byte replaced for each three of `edits`: where, and by what.
fn edited(base: &[u8], edits: &[u8]) -> Vec<u8> {
    let mut bytes = base.to_vec();
    for edit in edits.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
        bytes[at] = edit[2];
    }
    bytes
}

/// Whether it is a state.
fn state(text: &[u8]) -> bool {
    let Ok(state) = CheckpointState::from_json(text) else { return false };
    let _ = (state.check_files(), state.check_position());
    let written = serde_json::to_vec(&state).expect("a state can be written");
    assert_eq!(CheckpointState::from_json(&written), Ok(state));
    true
}

/// Whether it is a file of tensors.
fn weights(file: &[u8]) -> bool {
    let Ok(file) = SafeTensors::deserialize(file) else { return false };
    for (_, tensor) in file.tensors() {
        let elements = tensor.shape().iter().try_fold(1usize, |count, size| count.checked_mul(*size));
        assert_eq!(elements.and_then(|count| count.checked_mul(tensor.dtype().size())), Some(tensor.data().len()));
    }
    true
}
