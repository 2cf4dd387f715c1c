//! What the interactive loop does with a line; where lines come from and replies go is [`super::interactive`]'s matter.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::settings::{self, Settings};
use super::{TextParams, stream_text};
use crate::checkpoint::write_atomically;
use crate::data::Tokenizer;
use crate::model::TransformerLM;
use crate::stdout::{is_of_stdout, say_to};
use crate::{Error, Result};

const HELP: &str = "\
A line is a prompt; the model continues it. A line that ends with \\ goes on with the next; between two lines of \"\"\"
a prompt may have many.
  /more               continue the last text
  /load FILE          continue the text of a file
  /save FILE          write the last text into a new file; /save! FILE replaces one
  /set NAME VALUE     change a setting, for example /set temperature 0.7; at a terminal it is kept for the next time
  /settings           show the settings
  /stats              show how fast replies were
  /help               show this
  /quit               end; so do quit, exit, q and Ctrl-D
Ctrl-C stops a reply. A line that begins with a slash of its own: write two.
";

/// Begins and ends a prompt of several lines.
const QUOTE: &str = "\"\"\"";

/// Whether the loop goes on.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Read another line.
    Line,
    /// Read another line, which belongs to the same prompt.
    More,
    /// The user is done.
    End,
}

/// A prompt of which not all lines are there.
#[derive(Debug)]
enum Unfinished {
    /// The last line ended with a backslash.
    Continued(String),
    /// The closing quotes are missing.
    Quoted(String),
}

/// Tokens and seconds of replies.
#[derive(Debug, Default, Clone, Copy)]
struct Stats {
    tokens: usize,
    seconds: f64,
}

impl Stats {
    fn describe(self) -> String {
        let speed = if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 };
        format!("{} tokens in {:.2} s, {speed:.1} tokens/s", self.tokens, self.seconds)
    }
}

/// A conversation: settings and the last text.
pub(super) struct Session<'a> {
    model: &'a TransformerLM,
    tokenizer: &'a Tokenizer,
    params: TextParams,
    /// Where changed settings are kept for the next session.
    kept: Option<PathBuf>,
    /// Set from outside to stop the running reply.
    stop: &'a AtomicBool,
    unfinished: Option<Unfinished>,
    /// The last prompt and its reply.
    last: String,
    /// Replies so far; each draws from a seed of its own.
    replies: u64,
    last_stats: Stats,
    all_stats: Stats,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        model: &'a TransformerLM,
        tokenizer: &'a Tokenizer,
        params: TextParams,
        kept: Option<PathBuf>,
        stop: &'a AtomicBool,
    ) -> Self {
        let (last_stats, all_stats) = Default::default();
        let (last, replies, unfinished) = (String::new(), 0, None);
        Self { model, tokenizer, params, kept, stop, unfinished, last, replies, last_stats, all_stats }
    }

    /// Does what a line asks. Mistakes of the user are answered on `out`.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub(super) fn line(&mut self, line: &str, out: &mut dyn Write) -> Result<Next> {
        let line = line.trim_end_matches(['\r', '\n']);
        let is_new = self.unfinished.is_none();
        let Some(text) = self.gather(line) else { return Ok(Next::More) };
        if is_new && matches!(text.trim(), "quit" | "exit" | "q" | "/quit" | "/exit" | "/q") {
            return Ok(Next::End);
        }
        let outcome = if is_new { self.command(&text, out) } else { self.reply(&text, out) };
        match outcome {
            Err(error) if is_of_stdout(&error) => Err(error),
            Err(error) => say_to(out, &format!("{error}\n")).map(|()| Next::Line),
            Ok(()) => Ok(Next::Line),
        }
    }

    /// Adds a line to the prompt that is being entered; the whole of it when it is complete.
    fn gather(&mut self, line: &str) -> Option<String> {
        match self.unfinished.take() {
            None if line.trim() == QUOTE => self.unfinished = Some(Unfinished::Quoted(String::new())),
            None => match line.strip_suffix('\\') {
                None => return Some(line.to_owned()),
                Some(begun) => self.unfinished = Some(Unfinished::Continued(format!("{begun}\n"))),
            },
            Some(Unfinished::Quoted(text)) if line.trim() == QUOTE => {
                return Some(text.strip_suffix('\n').unwrap_or(&text).to_owned());
            }
            Some(Unfinished::Quoted(text)) => self.unfinished = Some(Unfinished::Quoted(format!("{text}{line}\n"))),
            Some(Unfinished::Continued(text)) => match line.strip_suffix('\\') {
                None => return Some(text + line),
                Some(begun) => self.unfinished = Some(Unfinished::Continued(format!("{text}{begun}\n"))),
            },
        }
        None
    }

    fn command(&mut self, line: &str, out: &mut dyn Write) -> Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let rest = || line.trim_start().split_once(char::is_whitespace).map_or("", |(_, rest)| rest.trim());
        match words[..] {
            [] => Ok(()),
            ["/help" | "/?"] => say_to(out, HELP),
            ["/settings"] => say_to(out, &settings::describe(&self.params)),
            ["/stats"] => say_to(out, &self.stats()),
            ["/set", name, ..] if words.len() > 2 => {
                let value = rest().split_once(char::is_whitespace).map_or("", |(_, value)| value.trim());
                self.set(name, value).and_then(|()| say_to(out, &settings::describe(&self.params)))
            }
            ["/set", ..] => Err(Error::Config("expected /set NAME VALUE, for example /set temperature 0.7".into())),
            ["/more"] => self.reply(&self.last.clone(), out),
            ["/load" | "/save" | "/save!"] => Err(Error::Config(format!("expected {} FILE", words[0]))),
            ["/load", ..] => self.load(Path::new(rest()), out),
            ["/save", ..] => self.save(Path::new(rest()), false, out),
            ["/save!", ..] => self.save(Path::new(rest()), true, out),
            [word, ..] if word.starts_with('/') && !word.starts_with("//") => {
                Err(Error::Config(format!("unknown command {word}; /help lists them")))
            }
            _ => self.reply(line.strip_prefix('/').filter(|rest| rest.starts_with('/')).unwrap_or(line), out),
        }
    }

    /// Streams the continuation of `prompt`.
    fn reply(&mut self, prompt: &str, out: &mut dyn Write) -> Result<()> {
        self.stop.store(false, Ordering::Relaxed);
        let params = TextParams { seed: self.params.seed.wrapping_add(self.replies), ..self.params.clone() };
        let started = Instant::now();
        let mut pieces = stream_text(self.model, self.tokenizer, prompt, &params)?;
        self.replies += 1;
        self.last = prompt.to_owned();
        say_to(out, prompt)?;
        let mut stopped = false;
        while let Some(piece) = pieces.next().filter(|_| !stopped) {
            let piece = piece?;
            say_to(out, &piece)?;
            self.last.push_str(&piece);
            stopped = self.stop.load(Ordering::Relaxed);
        }
        self.count(pieces.tokens(), started.elapsed().as_secs_f64());
        say_to(out, if stopped { "\n(stopped)\n" } else { "\n" })
    }

    fn count(&mut self, tokens: usize, seconds: f64) {
        self.last_stats = Stats { tokens, seconds };
        self.all_stats.tokens += tokens;
        self.all_stats.seconds += seconds;
    }

    fn stats(&self) -> String {
        let (last, all) = (self.last_stats.describe(), self.all_stats.describe());
        let replies = if self.replies == 1 { "reply" } else { "replies" };
        format!("last reply: {last}\n{} {replies}: {all}\n", self.replies)
    }

    fn load(&mut self, path: &Path, out: &mut dyn Write) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        self.reply(&text, out)
    }

    fn save(&mut self, path: &Path, replaces: bool, out: &mut dyn Write) -> Result<()> {
        if self.last.is_empty() {
            return Err(Error::Config("there is no text to save yet; enter a prompt first".into()));
        }
        if !replaces && path.symlink_metadata().is_ok() {
            let path = path.display();
            return Err(Error::Config(format!("{path} is there already; /save! {path} replaces it")));
        }
        write_atomically(path, self.last.as_bytes())?;
        say_to(out, &format!("{} bytes in {}\n", self.last.len(), path.display()))
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let name = name.replace('-', "_");
        self.params = settings::with(&self.params, &name, value)?;
        if name == "seed" {
            self.replies = 0;
        }
        match &self.kept {
            Some(path) => Settings::read(path)?.changed(&name, value).write(path),
            None => Ok(()),
        }
    }
}
