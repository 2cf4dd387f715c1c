//! What a person sees while training: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// Rank 0's voice; the other ranks hold a silent one.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    silent: bool,
}

impl Progress {
    /// Says nothing.
    pub fn silent() -> Progress {
        Progress { bar: None, silent: true }
    }

    /// Draws a bar over `total` updates of which `done` are done, where stderr is a terminal.
    pub fn new(done: u64, total: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_position(done);
            let template = "{bar:24} {pos}/{len} {msg} {elapsed} (eta {eta})";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.reset_eta();
            bar
        });
        Progress { bar, silent: false }
    }

    /// Moves the bar.
    pub fn step(&self, global_step: u64, loss: f64, lr: f64, tokens_per_s: f64) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("loss {loss:.4} lr {lr:.2e} {} tokens/s", thousands(tokens_per_s)));
            bar.set_position(global_step);
        }
    }

    /// Says a line. A closed pipe is no reason to stop training.
    pub fn line(&self, text: &str) {
        if self.silent {
            return;
        }
        let print = || drop(writeln!(std::io::stdout().lock(), "{text}"));
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// 12345.6 as `12,346`.
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.max(0.0));
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// 1 `rank`, 2 `rank`s.
pub(crate) fn count(number: usize, what: &str) -> String {
    let plural = match number {
        1 => "",
        _ if what.ends_with("ch") => "es",
        _ => "s",
    };
    format!("{number} {what}{plural}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_is_no_plural() {
        let cases = [(0, "rank", "0 ranks"), (1, "rank", "1 rank"), (2, "micro-batch", "2 micro-batches")];
        for (number, what, text) in cases {
            assert_eq!(super::count(number, what), text);
        }
    }

    #[test]
    fn thousands_are_set_apart() {
        let cases = [(0.0, "0"), (999.4, "999"), (1000.0, "1,000"), (1234567.0, "1,234,567")];
        for (value, text) in cases {
            assert_eq!(super::thousands(value), text);
        }
    }
}
