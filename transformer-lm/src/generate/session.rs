//! What the interactive loop does with a line; where lines come from and replies go is [`super::interactive`]'s matter.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{TextParams, stream_text};
use crate::data::Tokenizer;
use crate::model::TransformerLM;
use crate::{Error, Result};

const HELP: &str = "\
A line is a prompt; the model continues it.
  /more               continue the last text
  /set NAME VALUE     change a setting, for example /set temperature 0.7
  /settings           show the settings
  /help               show this
  /quit               end; so do quit, exit, q and Ctrl-D
Ctrl-C stops a reply. A line that begins with a slash of its own: write two.
";

/// Whether the loop goes on.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Read another line.
    Line,
    /// The user is done.
    End,
}

/// A conversation: settings and the last text.
pub(super) struct Session<'a> {
    model: &'a TransformerLM,
    tokenizer: &'a Tokenizer,
    params: TextParams,
    /// Set from outside to stop the running reply.
    stop: &'a AtomicBool,
    /// The last prompt and its reply.
    last: String,
    /// Replies so far; each draws from a seed of its own.
    replies: u64,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        model: &'a TransformerLM,
        tokenizer: &'a Tokenizer,
        params: TextParams,
        stop: &'a AtomicBool,
    ) -> Self {
        Self { model, tokenizer, params, stop, last: String::new(), replies: 0 }
    }

    /// Does what a line asks. Mistakes of the user are answered on `out`.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub(super) fn line(&mut self, line: &str, out: &mut dyn Write) -> Result<Next> {
        let line = line.trim_end_matches(['\r', '\n']);
        let words: Vec<&str> = line.split_whitespace().collect();
        let outcome = match words[..] {
            [] => Ok(()),
            ["quit" | "exit" | "q" | "/quit" | "/exit" | "/q"] => return Ok(Next::End),
            ["/help" | "/?"] => say(out, HELP),
            ["/settings"] => say(out, &self.settings()),
            ["/set", name, value] => self.set(name, value).and_then(|()| say(out, &self.settings())),
            ["/set", ..] => Err(Error::Config("expected /set NAME VALUE, for example /set temperature 0.7".into())),
            ["/more"] => self.reply(&self.last.clone(), out),
            [word, ..] if word.starts_with('/') && !word.starts_with("//") => {
                Err(Error::Config(format!("unknown command {word}; /help lists them")))
            }
            _ => self.reply(line.strip_prefix('/').filter(|rest| rest.starts_with('/')).unwrap_or(line), out),
        };
        match outcome {
            Err(error @ Error::Io { .. }) => Err(error),
            Err(error) => say(out, &format!("{error}\n")).map(|()| Next::Line),
            Ok(()) => Ok(Next::Line),
        }
    }

    /// Streams the continuation of `prompt`.
    fn reply(&mut self, prompt: &str, out: &mut dyn Write) -> Result<()> {
        self.stop.store(false, Ordering::Relaxed);
        let params = TextParams { seed: self.params.seed.wrapping_add(self.replies), ..self.params.clone() };
        let pieces = stream_text(self.model, self.tokenizer, prompt, &params)?;
        self.replies += 1;
        self.last = prompt.to_owned();
        say(out, prompt)?;
        for piece in pieces {
            let piece = piece?;
            say(out, &piece)?;
            self.last.push_str(&piece);
            if self.stop.load(Ordering::Relaxed) {
                return say(out, "\n(stopped)\n");
            }
        }
        say(out, "\n")
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let mut params = self.params.clone();
        match name.replace('-', "_").as_str() {
            "temperature" => params.sampling.temperature = parse(name, value)?,
            "top_k" => params.sampling.top_k = parse(name, value)?,
            "top_p" => params.sampling.top_p = parse(name, value)?,
            "max_new_tokens" => params.max_new_tokens = parse(name, value)?,
            "seed" => {
                params.seed = parse(name, value)?;
                self.replies = 0;
            }
            _ => return Err(Error::Config(format!("no setting is called {name}; /settings lists them"))),
        }
        params.sampling.validate()?;
        self.params = params;
        Ok(())
    }

    fn settings(&self) -> String {
        let TextParams { max_new_tokens, sampling, seed } = &self.params;
        let (temperature, top_k, top_p) = (sampling.temperature, sampling.top_k, sampling.top_p);
        format!(
            "temperature {temperature}, top_k {top_k}, top_p {top_p}, max_new_tokens {max_new_tokens}, seed {seed}\n"
        )
    }
}

fn parse<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| Error::Config(format!("{name} cannot be {value:?}; expected a number")))
}

/// Writes and flushes, so that text appears as it is drawn.
fn say(out: &mut dyn Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "standard output"))
}
