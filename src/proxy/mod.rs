//! See `src/lib.rs`.

mod settings;

pub use settings::Settings;
