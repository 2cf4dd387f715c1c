//! Panels with curves.

use super::canvas::{Anchor, Canvas, Colour, Pen};
use super::run::Run;

/// A panel, and the space around its curves.
const PANEL: (f32, f32) = (560.0, 320.0);
const MARGIN: Margin = Margin { left: 80.0, right: 20.0, top: 36.0, bottom: 36.0 };
const COLUMNS: usize = 2;
/// Height of a line of the legend.
const LEGEND: f32 = 22.0;

const AXES: Colour = [120, 120, 120];
const GRID: Colour = [225, 225, 225];
/// One for each run, then from the start; they differ for the colour-blind too (Okabe and Ito, 2008).
const COLOURS: [Colour; 7] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [0, 0, 0]];

struct Margin {
    left: f32,
    right: f32,
    top: f32,
    bottom: f32,
}

/// A title, and the curves of each run: the second one dashed.
const PANELS: [(&str, &[&str]); 9] = [
    ("loss in nats per token (validation dashed)", &["train/loss", "val/loss"]),
    ("bits per byte in validation", &["val/bits_per_byte"]),
    ("accuracy (validation dashed)", &["train/accuracy", "val/accuracy"]),
    ("learning rate", &["train/lr"]),
    ("gradient norm", &["train/grad_norm"]),
    ("tokens per second", &["train/throughput"]),
    ("milliseconds per update", &["train/step_ms"]),
    ("MiB of memory of rank 0", &["train/memory_mib"]),
    ("share of the time waiting for communication", &["train/waiting"]),
];

/// The colour of run `index`.
pub(super) fn colour(index: usize) -> Colour {
    COLOURS[index % COLOURS.len()]
}

/// Whether there is a panel for anything in `run`.
pub(super) fn draws(run: &Run) -> bool {
    PANELS.iter().flat_map(|(_, curves)| curves.iter()).any(|curve| run.curves.contains_key(*curve))
}

/// Width and height of the picture, in pixels.
pub(super) fn size(runs: &[Run]) -> (u32, u32) {
    let rows = panels(runs).count().div_ceil(COLUMNS);
    let height = PANEL.1 * rows as f32 + LEGEND * (runs.len() + 1) as f32;
    (PANEL.0 as u32 * COLUMNS as u32, height as u32)
}

/// Draws the legend and every panel that some run has a curve for.
pub(super) fn draw(runs: &[Run], canvas: &mut dyn Canvas) {
    for (index, run) in runs.iter().enumerate() {
        let y = LEGEND * (index + 1) as f32;
        let pen = Pen { colour: colour(index), width: 3.0, dashed: false };
        canvas.line(&[(20.0, y - 5.0), (50.0, y - 5.0)], pen);
        canvas.text((60.0, y), Anchor::Start, &run.name);
    }
    let top = LEGEND * (runs.len() + 1) as f32;
    for (index, (title, curves)) in panels(runs).enumerate() {
        let corner = (PANEL.0 * (index % COLUMNS) as f32, top + PANEL.1 * (index / COLUMNS) as f32);
        draw_panel(canvas, corner, title, &curves);
    }
}

/// A curve with its pen.
type Curve<'a> = (&'a [(f64, f64)], Pen);

fn panels(runs: &[Run]) -> impl Iterator<Item = (&'static str, Vec<Curve<'_>>)> {
    let curves = |names: &'static [&'static str]| {
        let of_run = |(index, run): (usize, &'_ Run)| -> Vec<(usize, usize)> {
            (0..names.len()).filter(|name| run.curves.contains_key(names[*name])).map(|name| (index, name)).collect()
        };
        let places: Vec<(usize, usize)> = runs.iter().enumerate().flat_map(of_run).collect();
        let curve = |(run, name): (usize, usize)| {
            let pen = Pen { colour: colour(run), width: 1.5, dashed: name == 1 };
            (runs[run].curves[names[name]].as_slice(), pen)
        };
        places.into_iter().map(curve).collect::<Vec<_>>()
    };
    PANELS.into_iter().map(move |(title, names)| (title, curves(names))).filter(|(_, curves)| !curves.is_empty())
}

fn draw_panel(canvas: &mut dyn Canvas, corner: (f32, f32), title: &str, curves: &[Curve]) {
    let (left, right) = (corner.0 + MARGIN.left, corner.0 + PANEL.0 - MARGIN.right);
    let (top, bottom) = (corner.1 + MARGIN.top, corner.1 + PANEL.1 - MARGIN.bottom);
    let points = || curves.iter().flat_map(|(points, _)| points.iter());
    let x = Scale::over(points().map(|point| point.0), left, right);
    let y = Scale::over(points().map(|point| point.1), bottom, top);
    canvas.text(((left + right) / 2.0, corner.1 + 22.0), Anchor::Middle, title);
    for tick in y.ticks() {
        let at = y.place(tick);
        canvas.line(&[(left, at), (right, at)], Pen { colour: GRID, width: 1.0, dashed: false });
        canvas.text((left - 6.0, at + 5.0), Anchor::End, &number(tick));
    }
    for tick in x.ticks() {
        canvas.text((x.place(tick), bottom + 18.0), Anchor::Middle, &number(tick));
    }
    canvas.line(&[(left, top), (left, bottom), (right, bottom)], Pen { colour: AXES, width: 1.0, dashed: false });
    for (points, pen) in curves {
        let places: Vec<(f32, f32)> = points.iter().map(|point| (x.place(point.0), y.place(point.1))).collect();
        match places[..] {
            // A single point would leave no ink.
            [(x, y)] => canvas.line(&[(x - 3.0, y), (x + 3.0, y)], *pen),
            _ => canvas.line(&places, *pen),
        }
    }
}

/// From values to pixels.
struct Scale {
    low: f64,
    high: f64,
    from: f32,
    to: f32,
}

impl Scale {
    fn over(values: impl Iterator<Item = f64>, from: f32, to: f32) -> Scale {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        match low < high {
            true => Scale { low, high, from, to },
            false => Scale { low: low - 0.5 * low.abs().max(1e-9), high: high + 0.5 * high.abs().max(1e-9), from, to },
        }
    }

    fn place(&self, value: f64) -> f32 {
        let share = ((value - self.low) / (self.high - self.low)) as f32;
        self.from + share * (self.to - self.from)
    }

    /// Three to eight round values.
    fn ticks(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|tick| *tick <= self.high + 1e-9 * step).collect()
    }
}

/// A few significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (1e-3..1e5).contains(&size) => {
            let text = format!("{value:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ticks_are_few_round_and_inside(low in -1e6f64..1e6, span in 1e-6f64..1e6) {
            let scale = Scale::over([low, low + span].into_iter(), 0.0, 100.0);
            let ticks = scale.ticks();
            prop_assert!((2..=8).contains(&ticks.len()), "{:?}", ticks);
            prop_assert!(ticks.iter().all(|tick| (-0.1..100.1).contains(&scale.place(*tick))));
        }
    }

    #[test]
    fn a_constant_has_a_scale_too() {
        for value in [0.0, -3.0, 1e-12] {
            let scale = Scale::over([value].into_iter(), 0.0, 100.0);
            assert!((scale.place(value) - 50.0).abs() < 1e-3 && !scale.ticks().is_empty());
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0.0, 1.5, 12000.0, 3e-4, 2.5e9, -0.25].map(number),
            ["0", "1.5", "12000", "3.0e-4", "2.5e9", "-0.25"]
        );
    }
}
