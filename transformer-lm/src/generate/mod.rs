//! Text from a checkpoint: once ([`generate_text`]), as it is drawn ([`stream_text`]), or as a conversation
//! ([`interactive_generation`]).

mod interactive;
mod load;
mod session;
mod text;

pub use interactive::interactive_generation;
pub use load::load_model_for_generation;
pub use text::{TextParams, TextStream, generate_text, stream_text};
