//! One client and one worker, who speak in turn.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Mutex,
        mpsc::{Sender, channel},
    },
    time::Instant,
};

use crate::support::{
    Client, Gate, Worker,
    client::request,
    patience,
    worker::{Script, json_answer, script, sse_end, sse_event, sse_head, worker},
};

/// Exchanges or events before those that are counted.
const WARM_UP: usize = 20;

/// Flags with which a proxy does as little as can be besides what it is asked for.
pub(crate) const QUIET: &[(&str, &str)] = &[
    ("--threads", "1"),
    ("--health-check-interval-secs", "3600"),
    ("--model-refresh-secs", "3600"),
    ("--dns-refresh-secs", "3600"),
    ("--engine-stats-interval", "3600"),
];

/// What is done many times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    /// A chat completion with 1 KB of prompt, on connections that are kept.
    Json,
    /// The same with 32 KB.
    Long,
    /// An event of a streamed chat completion, which comes alone.
    Event,
}

/// A worker that does what it is told for each request.
pub(crate) struct Scene {
    worker: Worker,
    scripts: Sender<Script>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let (scripts, told) = channel();
        let told = Mutex::new(told);
        let next = move |_: &_| told.lock().unwrap().recv().unwrap();
        Self { worker: worker().on_request("/v1/chat/completions", next).start(), scripts }
    }

    /// The worker, for a proxy to be put before it.
    pub(crate) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Plays `case` so many times after some to warm up, through the proxy at `addr` whose only shard is `shard`, and
    /// returns what `look` sees before and after them.
    pub(crate) fn play<T>(
        &self,
        addr: SocketAddr,
        shard: Thread,
        case: Case,
        times: usize,
        look: impl Fn() -> T,
    ) -> [T; 2] {
        let mut client = Client::connect(addr);
        let request = match case {
            Case::Json => chat(false, 900),
            Case::Long => chat(false, 32_000),
            Case::Event => return self.stream(&mut client, shard, times, look),
        };
        [WARM_UP, times].map(|times| {
            (0..times).for_each(|_| self.exchange(&mut client, shard, &request));
            look()
        })
    }

    fn exchange(&self, client: &mut Client, shard: Thread, request: &[u8]) {
        let gate = Gate::new();
        self.scripts.send(script().wait(&gate).send(json_answer(ANSWER))).unwrap();
        client.send(request);
        until("the worker has the request", || gate.waiting() == 1);
        shard.falls_asleep();
        gate.open();
        client.response().expect(200);
        shard.falls_asleep();
    }

    fn stream<T>(&self, client: &mut Client, shard: Thread, times: usize, look: impl Fn() -> T) -> [T; 2] {
        let gates: Vec<Gate> = (0..=WARM_UP + times).map(|_| Gate::new()).collect();
        let (end, events) = gates.split_last().unwrap();
        let events = events
            .iter()
            .fold(script().send(sse_head()), |script, gate| script.wait(gate).send(sse_event("token")));
        self.scripts.send(events.wait(end).send(sse_end())).unwrap();
        client.send(chat(true, 900)).read_until("\r\n\r\n");
        let mut sent = gates.iter();
        let seen = [WARM_UP, times].map(|times| {
            for gate in sent.by_ref().take(times) {
                until("the worker has an event to send", || gate.waiting() == 1);
                shard.falls_asleep();
                gate.open();
                client.read_until(sse_event("token"));
                shard.falls_asleep();
            }
            look()
        });
        end.open();
        client.read_until(sse_end());
        seen
    }
}

const ANSWER: &str = r#"{"id":"chatcmpl-7d1c0c1f","object":"chat.completion","created":1795252211,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"It does what it is told, in 16 tokens."},"finish_reason":"stop"}],"usage":{"prompt_tokens":250,"total_tokens":266,"completion_tokens":16}}"#;

fn chat(stream: bool, bytes: usize) -> Vec<u8> {
    let text = "word ".repeat(bytes / 5);
    let body = format!(
        r#"{{"messages":[{{"role":"user","content":"{text}"}}],"model":"m","max_tokens":16,"stream":{stream}}}"#
    );
    let headers =
        "Content-Type: application/json\r\nAuthorization: Bearer none\r\nAccept: application/json\r\n";
    request("POST", "/v1/chat/completions", headers, body.as_bytes())
}

/// A thread, of whatever process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Thread(pub(crate) u32);

impl Thread {
    /// The only shard among the threads `all`.
    pub(crate) fn shard_of(all: impl IntoIterator<Item = u32>) -> Self {
        let is_shard = |thread: &u32| {
            fs::read_to_string(format!("/proc/{thread}/comm")).is_ok_and(|name| name.trim() == "shard-0")
        };
        let shards: Vec<u32> = all.into_iter().filter(is_shard).collect();
        assert_eq!(shards.len(), 1, "shards: {shards:?}");
        Self(shards[0])
    }

    /// The only shard of a process.
    pub(crate) fn shard_of_process(process: u32) -> Self {
        let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
        Self::shard_of(threads.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()))
    }

    /// Waits until it waits. What it was to be given must have been given before: it has had its effect, or the kernel
    /// has woken it up.
    fn falls_asleep(self) {
        until("the shard has nothing to do", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap();
            // behind the name, in which anything may stand
            stat.rsplit(')').next().unwrap().trim_start().starts_with('S')
        });
    }
}

/// Looks without a pause, since thousands of times something is waited for that takes microseconds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < patience(), "it did not come true that {what}");
        std::thread::yield_now();
    }
}
