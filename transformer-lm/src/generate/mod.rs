//! Text from a checkpoint: once ([`generate_text`]), as it is drawn ([`stream_text`]), or as a conversation
//! ([`interactive_generation`]).

mod interactive;
mod load;
mod reply;
mod session;
mod settings;
mod text;

pub use interactive::{interactive_generation, with_kept_settings};
pub use load::load_model_for_generation;
pub use reply::Ending;
pub use text::{Sample, TextParams, TextStream, generate_samples, generate_text, stream_text};
