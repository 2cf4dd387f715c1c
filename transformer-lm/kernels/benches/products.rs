//! Products of bf16, in floating-point operations ("elements") per second of one thread: what the processor's unit reaches, and what is
//! left of it where operands come from the second cache or from memory, or the left one does not begin with a line of the cache.
//!
//! `cargo bench -p lm-kernels --bench products`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use lm_kernels::{Lines, Multiplier, PANEL, PanelRow, Unit, View, Window};

/// The depth that is summed over, and rows of a panel with it.
const DEPTH: usize = 256;
const PAIRS: usize = DEPTH / 2;

/// Rows that are multiplied with a panel at a time.
const STRIP: usize = 32;

/// Panels that do not stay in any cache of a core: 128 MiB.
const MANY: usize = 4096;

/// A block: the product of some rows with some panels.
struct Block {
    left: Lines<bf16>,
    /// Where the left matrix begins.
    start: usize,
    sums: Lines<f32>,
    panels: usize,
}

impl Block {
    fn new(rows: usize, panels: usize, start: usize) -> Block {
        let mut left = Lines::any(start + rows * DEPTH);
        left.fill(bf16::ONE);
        Block { left, start, sums: Lines::any(panels * rows * PANEL), panels }
    }

    fn rows(&self) -> usize {
        (self.left.len() - self.start) / DEPTH
    }

    fn operations(&self) -> Throughput {
        Throughput::Elements((2 * self.rows() * self.panels * PANEL * DEPTH) as u64)
    }

    fn multiply(&mut self, multiplier: &mut Multiplier, panels: &[PanelRow]) {
        let (left, rows) = (View::of(&self.left[self.start..], DEPTH), self.rows());
        for start in (0..rows).step_by(STRIP) {
            let strip = left.rows(start..start + STRIP);
            for (panel, sums) in panels.chunks(PAIRS).zip(self.sums.chunks_mut(rows * PANEL)) {
                let sums = &mut sums[start * PANEL..(start + STRIP) * PANEL];
                multiplier.multiply(strip, panel, &mut Window::of(sums, PANEL), false);
            }
        }
    }
}

fn products(c: &mut Criterion) {
    let mut many: Lines<PanelRow> = Lines::any(MANY * PAIRS);
    many.fill([0x3f80_3f80; PANEL]);
    for unit in Unit::available() {
        let mut group = c.benchmark_group(format!("products, {unit:?}"));
        // SAFETY: nobody else multiplies on this thread.
        let mut multiplier = unsafe { Multiplier::new(unit) };
        let cases =
            [("first cache", STRIP, 1, 0), ("first cache, off its lines", STRIP, 1, 8), ("second cache", 256, 4, 0)];
        for (name, rows, panels, start) in cases {
            let mut block = Block::new(rows, panels, start);
            group.throughput(block.operations());
            group.bench_function(name, |b| b.iter(|| block.multiply(&mut multiplier, &many[..panels * PAIRS])));
        }
        for (name, asks) in [("memory", false), ("memory, asked for", true)] {
            let mut block = Block::new(256, 4, 0);
            group.throughput(block.operations());
            let mut groups = many.chunks(block.panels * PAIRS).cycle().peekable();
            group.bench_function(name, |b| {
                b.iter(|| {
                    let Some(panels) = groups.next() else { return };
                    multiplier.forget();
                    if let Some(next) = groups.peek().filter(|_| asks) {
                        multiplier.ask_for(View::of(next, 1));
                    }
                    block.multiply(&mut multiplier, panels);
                });
            });
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
