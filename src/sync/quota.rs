//! A limit for all proxies together: how much of it is this proxy's.

/// This proxy's part of a limit on requests in flight that all proxies share.
#[derive(Debug)]
pub struct Quota {}

impl Quota {
    /// How many slots this proxy could use now: those in use, who waits for one, and who was refused lately.
    pub fn wanted(&self) -> u32 {
        0
    }

    /// Sets this proxy's part by what all want: itself and, in any order, the peers that are heard.
    pub fn settle(&self, _own: u32, _peers: &[u32]) {}
}
