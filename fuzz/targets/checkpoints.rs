//! A checkpoint's `state.json`, and the file format of its tensors up to where libtorch copies them.
#![no_main]

use lm_formats::state::CheckpointState;
use safetensors::SafeTensors;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(state) = CheckpointState::from_json(data) {
        let _ = (state.check_files(), state.check_position());
        let written = serde_json::to_vec(&state).expect("a state can be written");
        assert_eq!(CheckpointState::from_json(&written), Ok(state));
    }
    if let Ok(file) = SafeTensors::deserialize(data) {
        for (_, tensor) in file.tensors() {
            let elements = tensor.shape().iter().try_fold(1usize, |count, size| count.checked_mul(*size));
            assert_eq!(elements.and_then(|count| count.checked_mul(tensor.dtype().size())), Some(tensor.data().len()));
        }
    }
});
