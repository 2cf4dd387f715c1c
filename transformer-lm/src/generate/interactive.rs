//! The conversation at a terminal, or with lines from a pipe.

use std::io::{BufRead, IsTerminal, Write, stderr, stdin, stdout};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::TextParams;
use super::session::{Next, Session};
use super::settings::{Settings, file_of_user};
use crate::data::Tokenizer;
use crate::model::TransformerLM;
use crate::stdout::say;
use crate::{Error, Result};

const PROMPT: &str = "> ";
/// Before a further line of the same prompt.
const MORE: &str = ". ";

/// Reads prompts and answers them until the input ends or the user says `quit`, `exit` or `q`.
///
/// At a terminal, lines can be edited and recalled, Ctrl-C stops a reply, not the program, and settings that the user changes
/// are kept for the next time ([`with_kept_settings`]). Otherwise lines are read as they come and
/// nothing but replies is written.
///
/// # Errors
/// Where the terminal, the input or the output fails.
pub fn interactive_generation(model: &TransformerLM, tokenizer: &Tokenizer, params: &TextParams) -> Result<()> {
    params.sampling.validate()?;
    let stop = Arc::new(AtomicBool::new(false));
    if is_at_terminal() {
        signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&stop))
            .map_err(Error::io("handle", "Ctrl-C"))?;
        at_terminal(&mut Session::new(model, tokenizer, params.clone(), file_of_user(), &stop))
    } else {
        from_pipe(&mut Session::new(model, tokenizer, params.clone(), None, &stop))
    }
}

/// `params` with the settings that the user kept in earlier conversations, where a conversation would be at a terminal.
///
/// # Errors
/// A file of settings that cannot be read, or holds one that makes no sense.
pub fn with_kept_settings(params: &TextParams) -> Result<TextParams> {
    match file_of_user().filter(|_| is_at_terminal()) {
        Some(path) => Settings::read(&path)?.over(params).map_err(|error| {
            let hint = "hint: this file keeps what /set has changed; mend or remove it";
            Error::Config(format!("{}: {error}\n{hint}", path.display()))
        }),
        None => Ok(params.clone()),
    }
}

fn is_at_terminal() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

fn at_terminal(session: &mut Session) -> Result<()> {
    let mut editor = DefaultEditor::new().map_err(terminal_error)?;
    say("A line is a prompt. /help shows what else there is; Ctrl-C stops a reply, Ctrl-D ends.\n")?;
    let mut prompt = PROMPT;
    loop {
        match editor.readline(prompt) {
            Ok(line) => {
                let _ = editor.add_history_entry(&line); // A line that is not remembered is no reason to stop.
                prompt = match session.line(&line, &mut stdout())? {
                    Next::Line => PROMPT,
                    Next::More => MORE,
                    Next::End => return Ok(()),
                }
            }
            Err(ReadlineError::Interrupted) => say("(Ctrl-D or quit ends)\n")?,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(terminal_error(error)),
        }
    }
}

fn from_pipe(session: &mut Session) -> Result<()> {
    let mut out = stdout().lock();
    let mut input = stdin().lock();
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        // A person who types here while the output goes elsewhere wants to know that it is their turn.
        if stdin().is_terminal() {
            let _ = write!(stderr(), "{PROMPT}");
        }
        let read = input.read_until(b'\n', &mut bytes).map_err(Error::io("read", "standard input"))?;
        if read == 0 || session.line(&String::from_utf8_lossy(&bytes), &mut out)? == Next::End {
            return Ok(());
        }
    }
}

fn terminal_error(error: ReadlineError) -> Error {
    Error::io("use", "the terminal")(std::io::Error::other(error))
}
