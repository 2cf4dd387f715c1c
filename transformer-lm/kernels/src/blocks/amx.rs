//! Intel AMX: tiles of at most 16 rows of 64 bytes, of which the processor multiplies two and adds the product to a third
//! (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18).

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::cell::Cell;
use std::sync::OnceLock;

use half::bf16;

use crate::fetch::{Ahead, Runs};
use crate::{PANEL, Pair, PanelRow, View, Window};

/// Rows of a tile.
const ROWS: usize = 16;

/// Pairs in a row of a tile: of bf16 in the left matrix, or of those that lie one above the other in a panel, or sums.
const PAIRS: usize = 16;

/// Columns of sums that are computed at a time: two tiles beside each other.
const COLUMNS: usize = 2 * PAIRS;

/// Whether the processor has tiles of bf16, and the system lets this process use them, which it asks for.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_amx() && is_permitted())
}

fn has_amx() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    #[allow(unused_unsafe)] // it was unsafe in older versions of Rust
    // SAFETY: every processor of this architecture has the instruction.
    let features = unsafe { if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 } };
    features & (BF16 | TILE) == BF16 | TILE
}

/// Linux gives a process the state of tiles, which takes 8 KiB of each thread, when it asks.
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: two plain numbers; a kernel that does not know them says so.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

thread_local! {
    /// What this thread's tiles are configured for, if they are.
    static CONFIGURED: Cell<Option<Shape>> = const { Cell::new(None) };
}

/// Sums are in tiles 0 to 3, two beside two; the left matrix's two tiles are 4 and 5, the panel's 6 and 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Rows of the upper and of the lower tiles.
    rows: [usize; 2],
    /// The depth that is summed over at once.
    pairs: usize,
}

/// The processor's format (`LDTILECFG`).
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// # Safety
/// The processor has tiles, which nobody else uses on this thread; the shapes fit together, and the panel has rows.
#[inline]
pub(super) unsafe fn multiply(
    left: View<bf16>,
    panel: &[PanelRow],
    sums: &mut Window<f32>,
    adds: bool,
    ahead: &mut Ahead,
) {
    let (whole, rest) = (panel.len() / PAIRS, panel.len() % PAIRS);
    // SAFETY: the caller's promise; what is left of the depth begins where the whole steps end.
    unsafe {
        if whole > 0 {
            sum(left, panel, PAIRS, sums, adds, ahead);
        }
        if rest > 0 {
            let last = left.columns(2 * whole * PAIRS..2 * panel.len());
            sum(last, &panel[whole * PAIRS..], rest, sums, adds || whole > 0, ahead);
        }
    }
}

/// Sums over as many steps of `pairs` as the panel has; meanwhile asks for what is `ahead`.
///
/// # Safety
/// As above.
unsafe fn sum(
    left: View<bf16>,
    panel: &[PanelRow],
    pairs: usize,
    sums: &mut Window<f32>,
    adds: bool,
    ahead: &mut Ahead,
) {
    let steps = panel.len() / pairs;
    let [rows, _] = left.shape();
    for row in (0..rows).step_by(2 * ROWS) {
        let count = (rows - row).min(2 * ROWS);
        let upper = count.min(ROWS);
        configure(Shape { rows: [upper, count - upper], pairs });
        for column in (0..PANEL).step_by(COLUMNS) {
            let block = Block {
                left: left.at(row),
                left_stride: left.stride() * size_of::<bf16>(),
                panel: panel.as_ptr().cast::<Pair>().wrapping_add(column),
                steps,
                sums: sums.at(row).wrapping_add(column),
                sums_stride: sums.stride() * size_of::<f32>(),
                adds,
            };
            // SAFETY: the tiles are configured for these rows, and the columns lie within the panel, which has steps.
            unsafe {
                match count > ROWS {
                    true => block.two_rows_of_tiles(ahead.take(steps)),
                    false => block.one_row_of_tiles(),
                }
            }
        }
    }
}

fn configure(shape: Shape) {
    if CONFIGURED.get() == Some(shape) {
        return;
    }
    let Shape { rows: [upper, lower], pairs } = shape;
    // Tiles without rows have no columns either.
    let tile = |rows: usize, columns: usize| (rows as u8, if rows > 0 { 4 * columns as u16 } else { 0 });
    let [of_sums, below, panel] = [tile(upper, PAIRS), tile(lower, PAIRS), tile(pairs, PAIRS)];
    let tiles = [of_sums, of_sums, below, below, tile(upper, pairs), tile(lower, pairs), panel, panel];
    let mut configuration =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (at, (rows, bytes)) in tiles.into_iter().enumerate() {
        (configuration.rows[at], configuration.row_bytes[at]) = (rows, bytes);
    }
    // SAFETY: a configuration of a processor that has tiles, which it reads.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack)) };
    CONFIGURED.set(Some(shape));
}

/// Gives this thread's tiles back, if it has any.
pub(super) fn release() {
    if CONFIGURED.take().is_some() {
        // SAFETY: the tiles were configured, so the processor has them.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// A block of sums, and what they are the sums of. Strides are in bytes.
struct Block {
    left: *const bf16,
    left_stride: usize,
    panel: *const Pair,
    steps: usize,
    sums: *mut f32,
    sums_stride: usize,
    adds: bool,
}

/// From a panel's row to the next, in bytes.
const PANEL_STRIDE: usize = size_of::<PanelRow>();

impl Block {
    /// 17 to 32 rows: of each tile that is loaded two products are made. With each step the next of `ahead` is asked for.
    ///
    /// # Safety
    /// The tiles are configured for the rows, and are nobody else's; all of the block is valid, and has steps.
    unsafe fn two_rows_of_tiles(&self, ahead: Option<Runs>) {
        let (ahead, ahead_step) = ahead.map_or((std::ptr::null(), 0), |runs| (runs.first, runs.stride));
        debug_assert!(self.steps > 0);
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "test {adds:e}, {adds:e}",
                "jz 2f",
                "tileloadd tmm0, [{upper} + {sums_stride}]",
                "tileloadd tmm1, [{upper} + {sums_stride} + 64]",
                "tileloadd tmm2, [{lower} + {sums_stride}]",
                "tileloadd tmm3, [{lower} + {sums_stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm6, [{panel} + {panel_stride}]",
                "tileloadd tmm4, [{left} + {left_stride}]",
                "test {ahead_step}, {ahead_step}",
                "jz 4f",
                "prefetcht1 [{ahead}]",
                "prefetcht1 [{ahead} + 64]",
                "prefetcht1 [{ahead} + 128]",
                "prefetcht1 [{ahead} + 192]",
                "prefetcht1 [{ahead} + 256]",
                "prefetcht1 [{ahead} + 320]",
                "prefetcht1 [{ahead} + 384]",
                "prefetcht1 [{ahead} + 448]",
                "add {ahead}, {ahead_step}",
                "4:",
                "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left_below} + {left_stride}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 64",
                "add {left_below}, 64",
                "add {panel}, {panel_step}",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{upper} + {sums_stride}], tmm0",
                "tilestored [{upper} + {sums_stride} + 64], tmm1",
                "tilestored [{lower} + {sums_stride}], tmm2",
                "tilestored [{lower} + {sums_stride} + 64], tmm3",
                adds = in(reg) u32::from(self.adds),
                left = inout(reg) self.left => _,
                left_below = inout(reg) self.left.wrapping_byte_add(ROWS * self.left_stride) => _,
                left_stride = in(reg) self.left_stride,
                panel = inout(reg) self.panel => _,
                panel_stride = in(reg) PANEL_STRIDE,
                panel_step = const PAIRS * PANEL_STRIDE,
                ahead = inout(reg) ahead => _,
                ahead_step = in(reg) ahead_step,
                steps = inout(reg) self.steps => _,
                upper = in(reg) self.sums,
                lower = in(reg) self.sums.wrapping_byte_add(ROWS * self.sums_stride),
                sums_stride = in(reg) self.sums_stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// At most 16 rows.
    ///
    /// # Safety
    /// As above.
    unsafe fn one_row_of_tiles(&self) {
        debug_assert!(self.steps > 0);
        // SAFETY: as above.
        unsafe {
            asm!(
                "test {adds:e}, {adds:e}",
                "jz 2f",
                "tileloadd tmm0, [{sums} + {sums_stride}]",
                "tileloadd tmm1, [{sums} + {sums_stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "3:",
                "tileloadd tmm4, [{left} + {left_stride}]",
                "tileloadd tmm6, [{panel} + {panel_stride}]",
                "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {left}, 64",
                "add {panel}, {panel_step}",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{sums} + {sums_stride}], tmm0",
                "tilestored [{sums} + {sums_stride} + 64], tmm1",
                adds = in(reg) u32::from(self.adds),
                left = inout(reg) self.left => _,
                left_stride = in(reg) self.left_stride,
                panel = inout(reg) self.panel => _,
                panel_stride = in(reg) PANEL_STRIDE,
                panel_step = const PAIRS * PANEL_STRIDE,
                steps = inout(reg) self.steps => _,
                sums = in(reg) self.sums,
                sums_stride = in(reg) self.sums_stride,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
