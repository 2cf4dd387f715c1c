//! Writes libtorch's folder into the binaries, so that they run without LD_LIBRARY_PATH.

fn main() {
    let lib = std::env::var("DEP_HVD_TORCH_LIBTORCH_LIB").expect("hvd-torch re-exports libtorch's folder");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
