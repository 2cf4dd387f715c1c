//! Compiles the C++ shim, and tells whoever depends on this crate where libtorch lies.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc/shim.cpp");

    // torch-sys tells its direct dependants, and only them, where it found libtorch.
    let lib = std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names libtorch's folder");
    compile_shim(&Path::new(&lib).parent().expect("libtorch's lib folder has a parent").join("include"));
    link_openmp(Path::new(&lib));

    // Our own tests and examples find libtorch at run time without LD_LIBRARY_PATH.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    // A link argument does not reach dependants. They read this, as DEP_HVD_TORCH_LIBTORCH_LIB in their own build.rs,
    // and print the line above for their binaries.
    println!("cargo:libtorch_lib={lib}");
}

fn compile_shim(include: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .warnings(false)
        // Vectorise on old compilers too; never fuse multiply and add, so that sums have the same bits everywhere.
        .flag("-ftree-vectorize")
        .flag("-ffp-contract=off")
        // `at::parallel_for` is a template: without OpenMP it would be compiled into a loop of one thread.
        .flag("-fopenmp")
        .flag("-isystem")
        .flag(include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .file("csrc/shim.cpp")
        .compile("hvd_torch_shim");
}

/// Links the OpenMP library that libtorch runs its loops with, so that there is one number of threads and one pool of them. Where
/// libtorch brings it along, its name may carry a hash.
fn link_openmp(lib: &Path) {
    let files = std::fs::read_dir(lib).into_iter().flatten().flatten();
    let mut names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    match names.find(|name| name.starts_with("libgomp") && name.contains(".so")) {
        Some(name) => {
            println!("cargo:rustc-link-search=native={}", lib.display());
            println!("cargo:rustc-link-lib=dylib:+verbatim={name}");
        }
        None => println!("cargo:rustc-link-lib=gomp"),
    }
}
