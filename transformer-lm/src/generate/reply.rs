//! A reply as it grows: tokens in, text out, until a stop text or the end token.

use crate::data::{StreamDecoder, Tokenizer};

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// It has as many tokens as were asked for.
    Length,
    /// The model drew the end token.
    End,
    /// A stop text came.
    Stop,
}

/// One reply. Text that may be the beginning of a stop text is held back until it is known not to be.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Option<StreamDecoder<'a>>,
    stops: Vec<String>,
    held: String,
    /// Tokens drawn so far.
    pub tokens: usize,
    /// Why it ended; none while it may go on.
    pub ending: Option<Ending>,
}

impl<'a> Reply<'a> {
    /// A reply without a token, that ends before the first of `stops`.
    pub(super) fn new(tokenizer: &'a Tokenizer, stops: &[String]) -> Self {
        let decoder = Some(StreamDecoder::new(tokenizer));
        Self { tokenizer, decoder, stops: stops.to_vec(), held: String::new(), tokens: 0, ending: None }
    }

    /// The text that is certain with this token; none is the end of a sequence.
    pub(super) fn push(&mut self, token: Option<i64>) -> String {
        if self.ending.is_some() {
            return String::new();
        }
        let end = self.tokenizer.end_token();
        let Some(token) = token.and_then(|token| u32::try_from(token).ok()).filter(|&token| Some(token) != end) else {
            return self.close(Ending::End);
        };
        self.tokens += 1;
        let text = self.decoder.as_mut().map(|decoder| decoder.push(token)).unwrap_or_default();
        self.take(&text)
    }

    /// The rest of the text, where there is no further token.
    pub(super) fn finish(&mut self) -> String {
        if self.ending.is_some() { String::new() } else { self.close(Ending::Length) }
    }

    fn close(&mut self, ending: Ending) -> String {
        let rest = self.decoder.take().map(StreamDecoder::finish).unwrap_or_default();
        let text = self.take(&rest) + &std::mem::take(&mut self.held);
        self.ending.get_or_insert(ending);
        text
    }

    /// Adds text to what is held, and gives what of it is certain.
    fn take(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.ending = Some(Ending::Stop);
            let held = std::mem::take(&mut self.held);
            return held[..at].to_owned();
        }
        let certain = self.held.len() - self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(certain);
        std::mem::replace(&mut self.held, rest)
    }
}

/// The length of the longest end of `text` that `stop` begins with, in bytes.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = text.char_indices().map(|(at, _)| at).filter(|at| text.len() - at < stop.len());
    starts.map(|at| &text[at..]).find(|end| stop.starts_with(end)).map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn replied(text: &str, stops: &[String]) -> (String, Option<Ending>, bool) {
        let mut reply = Reply::new(&Tokenizer::Byte, stops);
        let mut out = String::new();
        let mut early = true;
        for byte in text.bytes() {
            out += &reply.push(Some(byte.into()));
            early &= reply.ending.is_some() || out.len() + 8 > reply.tokens;
        }
        out += &reply.finish();
        (out, reply.ending, early)
    }

    proptest! {
        #[test]
        fn a_reply_ends_before_the_first_stop(text in "[ab\n]{0,20}", stops in prop::collection::vec("[ab\n]{1,4}", 0..3)) {
            let first = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
            let (out, ending, early) = replied(&text, &stops);
            prop_assert!(early, "text is held back for longer than a stop text");
            match first {
                None => prop_assert_eq!((out.as_str(), ending), (text.as_str(), Some(Ending::Length))),
                Some(_) => {
                    prop_assert_eq!(ending, Some(Ending::Stop));
                    prop_assert!(text.starts_with(&out) && !stops.iter().any(|stop| out.contains(stop.as_str())));
                    prop_assert!(stops.iter().any(|stop| text[out.len()..].starts_with(stop.as_str())));
                }
            }
        }
    }

    #[test]
    fn the_end_token_is_no_text() {
        let mut reply = Reply::new(&Tokenizer::Gpt2, &["<|".to_string()]);
        assert_eq!(reply.push(Some(15496)) + &reply.push(Some(50256)), "Hello");
        assert_eq!((reply.ending, reply.tokens), (Some(Ending::End), 1));
    }
}
