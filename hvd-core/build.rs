//! Gives the build a name, so that ranks of different builds can refuse each other: `BUILD_DIGEST`, a digest of the sources.

use std::path::{Path, PathBuf};

fn main() {
    let mut files = Vec::new();
    for folder in SOURCES {
        println!("cargo::rerun-if-changed={folder}");
        collect(Path::new(folder), &mut files).expect("the sources of this crate can be read");
    }
    files.sort();
    let digest = files.iter().fold(FNV_OFFSET, |hash, file| {
        let text = std::fs::read(file).expect("a source of this crate can be read");
        let name = file.to_string_lossy();
        text.iter().chain(name.as_bytes()).fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME))
    });
    println!("cargo::rustc-env=BUILD_DIGEST={}-{digest:016x}", std::env!("CARGO_PKG_VERSION"));
}

/// All that decides what ranks send each other, and the bits of their results.
const SOURCES: [&str; 2] = ["src", "kernels/src"];

/// FNV-1a with 64 bits.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => collect(&path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}
