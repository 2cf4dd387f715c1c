//! Compiles a loop several times, for several instruction sets, and picks one at run time.
//!
//! The loops are plain Rust that the compiler vectorises. They do the same IEEE operations in the same order whatever the width, and Rust
//! never contracts a multiplication and an addition that the loop does not ask it to (`mul_add`), so that the bits do not depend on the
//! CPU. A CPU without FMA calls the C library for each `mul_add`. The exception is [`Isa::BF16`], for loops that use it.

/// A loop over elements. [`Kernel::run`] and all that it calls must be `#[inline(always)]`, or else they are compiled
/// for the baseline only.
pub trait Kernel {
    /// Runs the loop, compiled for `I`.
    fn run<I: Isa>(self);
}

/// What a loop may use besides plain Rust.
pub trait Isa {
    /// The instructions that convert eight binary16 at once, where there are any.
    const F16C: Option<F16c>;
    /// The instructions on vectors of 512 bits, where there are any.
    const AVX512: Option<Avx512> = None;
    /// The instructions that round vectors of 512 bits to bf16, where there are any. They take subnormal numbers for zero, and keep a
    /// NaN's sign.
    const BF16: Option<Avx512Bf16> = None;
}

/// Proof that the code in hand is compiled for F16C, and the CPU has it.
#[derive(Clone, Copy)]
pub struct F16c(());

/// Proof that the code in hand is compiled for AVX-512 (F, BW, DQ and VL), and the CPU has it.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Proof that the code in hand is compiled for AVX-512 BF16 besides, and the CPU has it.
#[derive(Clone, Copy)]
pub struct Avx512Bf16(());

/// Nothing.
enum Plain {}

/// AVX2, with FMA and F16C, which come with it.
#[cfg(target_arch = "x86_64")]
enum Avx {}

/// AVX-512.
#[cfg(target_arch = "x86_64")]
enum Wide {}

/// AVX-512 with BF16.
#[cfg(target_arch = "x86_64")]
enum WideBf16 {}

impl Isa for Plain {
    const F16C: Option<F16c> = None;
}

#[cfg(target_arch = "x86_64")]
impl Isa for Avx {
    const F16C: Option<F16c> = Some(F16c(()));
}

#[cfg(target_arch = "x86_64")]
impl Isa for Wide {
    const F16C: Option<F16c> = Some(F16c(()));
    const AVX512: Option<Avx512> = Some(Avx512(()));
}

#[cfg(target_arch = "x86_64")]
impl Isa for WideBf16 {
    const F16C: Option<F16c> = Some(F16c(()));
    const AVX512: Option<Avx512> = Some(Avx512(()));
    const BF16: Option<Avx512Bf16> = Some(Avx512Bf16(()));
}

/// What a kernel can be compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of the architecture has.
    Baseline,
    /// 256-bit vectors of all types, and fused multiplication and addition.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors of all types.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same, with bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Level {
    /// The best that this CPU has.
    #[inline]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                let wide = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
                return match wide {
                    true if has!("avx512bf16") => Level::Avx512Bf16,
                    true => Level::Avx512,
                    false => Level::Avx2,
                };
            }
        }
        Level::Baseline
    }

    /// All that this CPU has: for tests that compare them.
    pub fn available() -> impl Iterator<Item = Level> {
        let all = [
            Level::Baseline,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16,
        ];
        all.into_iter().filter(|level| *level <= Level::best())
    }
}

/// Runs the kernel compiled for the best instruction set that this CPU has.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) {
    dispatch_at(Level::best(), kernel);
}

/// Runs the kernel compiled for a level.
///
/// # Panics
/// If the CPU does not have it.
#[inline]
pub fn dispatch_at<K: Kernel>(level: Level, kernel: K) {
    assert!(level <= Level::best(), "no {level:?} here");
    match level {
        Level::Baseline => kernel.run::<Plain>(),
        // SAFETY: the assertion has found that the CPU has what the function is compiled for.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => unsafe { avx512_bf16(kernel) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn avx512_bf16<K: Kernel>(kernel: K) {
    kernel.run::<WideBf16>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<K: Kernel>(kernel: K) {
    kernel.run::<Wide>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) {
    kernel.run::<Avx>();
}
