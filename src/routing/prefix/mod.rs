//! Which prompts share how much with what a worker has computed before.

mod prompt;

pub use prompt::Prompt;
