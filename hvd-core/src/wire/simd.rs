//! Compiles a loop several times, for several instruction sets, and picks one at run time.
//!
//! The loops are plain Rust that the compiler vectorises. They do the same IEEE operations in the same order whatever
//! the width, and Rust never contracts a multiplication and an addition, so that the bits do not depend on the CPU.

/// A loop over elements. [`Kernel::run`] and all that it calls must be `#[inline(always)]`, or else they are compiled
/// for the baseline only.
pub(crate) trait Kernel {
    /// Runs the loop.
    fn run(self);
}

/// Runs the kernel compiled for the best instruction set that this CPU has.
#[inline]
pub(crate) fn dispatch<K: Kernel>(kernel: K) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
            // SAFETY: the CPU has what the function is compiled for.
            return unsafe { avx512(kernel) };
        }
        if has!("avx2") {
            // SAFETY: as above.
            return unsafe { avx2(kernel) };
        }
    }
    kernel.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<K: Kernel>(kernel: K) {
    kernel.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<K: Kernel>(kernel: K) {
    kernel.run();
}
