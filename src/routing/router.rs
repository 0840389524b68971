//! Who chooses for which model: the policies of one shard.

use crate::{
    routing::{Candidates, Needs, Outcome, Policy, Prompt, RouteInput, Selection, Shared},
    vllm::{Facts, Ranges},
};

/// The policies of one shard.
pub struct Router {
    policy: Box<dyn Policy>,
    needs: Needs,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("needs", &self.needs).finish_non_exhaustive()
    }
}

impl Router {
    /// As the settings say.
    pub fn new(shared: &Shared) -> Self {
        let row = shared.settings.policy.0;
        Self { policy: (row.build)(shared), needs: row.needs }
    }

    /// What has to be known of requests.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// The session.
    pub fn session<'a>(
        &self,
        header: impl Fn(&str) -> Option<&'a [u8]>,
        body: Option<(&[u8], &Ranges)>,
    ) -> Option<u64> {
        let _ = (header, body);
        None
    }

    /// The prompt in a body.
    pub fn prompt(&self, body: &[u8], facts: &Facts, model: Option<&str>) -> Prompt {
        let _ = (body, facts, model);
        Prompt::default()
    }

    /// A prompt of which only the length is known, in bytes.
    pub fn prompt_of_length(&self, bytes: u64, model: Option<&str>) -> Prompt {
        let _ = (bytes, model);
        Prompt::default()
    }

    /// The choice.
    pub fn choose(
        &mut self,
        model: Option<&str>,
        input: &RouteInput<'_>,
        candidates: &Candidates<'_>,
    ) -> Option<Selection> {
        let _ = model;
        self.policy.choose(input, candidates)
    }

    /// What became of a choice.
    pub fn ended(&mut self, model: Option<&str>, outcome: &Outcome<'_>) {
        let _ = model;
        self.policy.ended(outcome);
    }
}
