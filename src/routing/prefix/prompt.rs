//! A prompt as the prefix index sees it.

/// A prompt: hashes of its chunks, each chained to the one before it, and how many tokens it is believed to have.
/// Empty where nothing of it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    /// In the prompt's order.
    chunks: Vec<u64>,
    tokens: u64,
}

impl Prompt {
    /// A prompt of these chunks and so many tokens.
    pub fn new(chunks: Vec<u64>, tokens: u64) -> Self {
        Self { chunks, tokens }
    }

    /// The chained hashes of its chunks.
    pub fn chunks(&self) -> &[u64] {
        &self.chunks
    }

    /// Tokens that it is believed to have.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }
}
