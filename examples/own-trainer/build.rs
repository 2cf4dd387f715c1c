//! Writes libtorch's folder into the binary, which then runs without LD_LIBRARY_PATH.
//!
//! hvd-torch knows the folder and tells it to the packages that depend on it directly. It cannot do more for them: cargo lets no
//! library add link arguments to somebody else's binary. So every package with binaries, tests or examples has these lines.

fn main() {
    let lib = std::env::var("DEP_HVD_TORCH_LIBTORCH_LIB").expect("hvd-torch names libtorch's folder");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
