//! Lets the program find libtorch without LD_LIBRARY_PATH.
//!
//! hvd-torch links libtorch, but a linker argument of a library does not reach the programs that use it. So hvd-torch
//! tells its direct dependants where libtorch lies (cargo makes that the variable below), and each package with
//! programs, tests or examples writes the folder into them.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let lib = std::env::var("DEP_HVD_TORCH_LIBTORCH_LIB").expect("hvd-torch names libtorch's folder");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
