#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| hvd_core::fuzzing::frames(data));
