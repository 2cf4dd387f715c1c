//! The HTML around the curves.

use super::canvas::escaped;
use super::run::Run;

const STYLE: &str = "body{font-family:sans-serif;margin:2em;max-width:1140px}table{border-collapse:collapse;margin:1em 0}\
                     td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}td:first-child,th:first-child\
                     {text-align:left}pre{background:#f5f5f5;padding:1em;white-space:pre-wrap}svg{max-width:100%;height:auto}";

/// A column of the table: its title, a curve, whether its lowest value counts or its last, and digits.
const COLUMNS: [(&str, &str, bool, usize); 6] = [
    ("training loss", "train/loss", false, 4),
    ("best validation loss", "val/loss", true, 4),
    ("bits per byte", "val/bits_per_byte", true, 4),
    ("tokens/s", "train/throughput", false, 0),
    ("ms per update", "train/step_ms", false, 1),
    ("seconds", "train/wall_time", false, 0),
];

/// The whole page.
pub(super) fn html(runs: &[Run], svg: &str) -> String {
    let titles: String = COLUMNS.iter().map(|(title, ..)| format!("<th>{title}</th>")).collect();
    let rows: String = runs.iter().map(row).collect();
    let samples: String = runs.iter().filter_map(sample).collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Training report</title><style>{STYLE}</style></head>\n\
         <body><h1>Training report</h1>\n<table><tr><th>run</th><th>updates</th>{titles}</tr>\n{rows}</table>\n{svg}{samples}\
         </body></html>\n"
    )
}

fn row(run: &Run) -> String {
    let cell = |(_, curve, lowest, digits): &(&str, &str, bool, usize)| {
        let value = if *lowest { run.lowest(curve) } else { run.last(curve) };
        format!("<td>{}</td>", value.map(|value| format!("{value:.digits$}")).unwrap_or_default())
    };
    let cells: String = COLUMNS.iter().map(cell).collect();
    format!("<tr><td>{}</td><td>{}</td>{cells}</tr>\n", escaped(&run.name), run.updates())
}

fn sample(run: &Run) -> Option<String> {
    let (step, text) = run.sample.as_ref()?;
    Some(format!("<h2>{} wrote after {step} updates</h2>\n<pre>{}</pre>\n", escaped(&run.name), escaped(text)))
}
