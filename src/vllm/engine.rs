//! What a vLLM server says of its engines: the text of its `/metrics`, and the ORCA field of its answers.
//!
//! The two front ends of vLLM write labels in different orders, so labels are read and positions are not. What
//! is not understood is skipped: a figure that a version of vLLM does not have is unknown, never an error. One
//! pass over the text; what is kept does not grow with it.
//!
//! A server with data parallelism has a series per engine. All series of an engine carry one `model_name`, the
//! first served name (vLLM 0.32, `v1/metrics/loggers.py`); adapters stand only in the labels of
//! `vllm:lora_requests_info`. Where something between shows an engine under several names all the same, it is
//! still one engine, and the largest figure counts.

use std::{borrow::Cow, collections::BTreeMap};

use memchr::{memchr, memchr_iter};
use serde::Deserialize;

/// Engines of one server that are told apart at most.
const MAX_ENGINES: usize = 1024;

/// The longest ORCA field that is read, in bytes; vLLM's has about a hundred.
const MAX_ORCA_BYTES: usize = 4096;

/// Figures of an engine, or of all of them. `None`: not told.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Requests that are being computed.
    pub running: Option<u32>,
    /// Requests that wait for it.
    pub waiting: Option<u32>,
    /// Share of the KV cache in use, 0 to 1; of several engines the highest.
    pub kv_usage: Option<f64>,
    /// Tokens that the prefix cache can hold; 0 where there is none.
    pub cache_tokens: Option<u64>,
    /// Tokens of a block of it.
    pub block_tokens: Option<u32>,
    /// Whether it sleeps; of several engines, whether any does.
    pub asleep: Option<bool>,
    /// Tokens that were looked up in the prefix cache since the engine was started.
    pub prefix_queries: Option<f64>,
}

impl Figures {
    /// Those of both engines.
    fn and(self, other: Self) -> Self {
        Self {
            running: merged(self.running, other.running, u32::saturating_add),
            waiting: merged(self.waiting, other.waiting, u32::saturating_add),
            kv_usage: merged(self.kv_usage, other.kv_usage, f64::max),
            cache_tokens: merged(self.cache_tokens, other.cache_tokens, u64::saturating_add),
            block_tokens: merged(self.block_tokens, other.block_tokens, u32::max),
            asleep: merged(self.asleep, other.asleep, |a, b| a | b),
            prefix_queries: merged(self.prefix_queries, other.prefix_queries, |a, b| a + b),
        }
    }
}

fn merged<T>(a: Option<T>, b: Option<T>, both: impl FnOnce(T, T) -> T) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(both(a, b)),
        (a, b) => a.or(b),
    }
}

/// What the text of a `/metrics` says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineReport {
    /// By the label `engine`; `None`: series without one.
    engines: BTreeMap<Option<u32>, Figures>,
    /// When the server's process was started, in seconds since 1970. Not told by a server of several API
    /// processes.
    pub process_start: Option<f64>,
}

impl EngineReport {
    /// The figures of all engines together.
    pub fn total(&self) -> Figures {
        self.engines.values().copied().fold(Figures::default(), Figures::and)
    }

    /// The figures of one engine; `None` if no series is its own.
    pub fn engine(&self, number: u32) -> Option<Figures> {
        self.engines.get(&Some(number)).copied()
    }
}

/// What a series is of.
#[derive(Clone, Copy)]
enum Series {
    Running,
    Waiting,
    KvUsage,
    CacheConfig,
    SleepState,
    PrefixQueries,
    ProcessStart,
}

impl Series {
    fn named(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"vllm:num_requests_running" => Self::Running,
            b"vllm:num_requests_waiting" => Self::Waiting,
            // the second is its name before vLLM 0.11
            b"vllm:kv_cache_usage_perc" | b"vllm:gpu_cache_usage_perc" => Self::KvUsage,
            b"vllm:cache_config_info" => Self::CacheConfig,
            b"vllm:engine_sleep_state" => Self::SleepState,
            b"vllm:prefix_cache_queries_total" | b"vllm:gpu_prefix_cache_queries_total" => {
                Self::PrefixQueries
            }
            b"process_start_time_seconds" => Self::ProcessStart,
            _ => return None,
        })
    }
}

/// Reads the text of a `/metrics`, of either format.
pub fn parse_engines(text: &[u8]) -> EngineReport {
    let mut report = EngineReport::default();
    let mut begin = 0;
    for end in memchr_iter(b'\n', text).chain([text.len()]) {
        let line = text.get(begin..end).unwrap_or_default();
        begin = end + 1;
        let name_end = line.iter().position(|byte| matches!(byte, b'{' | b' ' | b'\t'));
        let Some((name, rest)) = name_end.and_then(|at| line.split_at_checked(at)) else { continue };
        if let Some(series) = Series::named(name) {
            // a line that is broken tells nothing
            let _: Option<()> = report.take(series, rest);
        }
    }
    report
}

impl EngineReport {
    /// Takes over one series; `rest` is its line behind the name.
    fn take(&mut self, series: Series, rest: &[u8]) -> Option<()> {
        let mut engine = None;
        let mut config = CacheConfig::default();
        let mut state_awake = false;
        let value = labels(rest, |name, value| match name {
            b"engine" => engine = number(value),
            b"sleep_state" => state_awake = value == b"awake",
            _ => config.take(name, value),
        })?;
        let value: f64 = str::from_utf8(value).ok()?.parse().ok().filter(|value: &f64| *value >= 0.0)?;
        if let Series::ProcessStart = series {
            self.process_start = larger(self.process_start, value);
            return Some(());
        }
        if self.engines.len() >= MAX_ENGINES && !self.engines.contains_key(&engine) {
            return None;
        }
        let figures = self.engines.entry(engine).or_default();
        // as numbers of requests and tokens are, and saturating where they are not
        let count = value as u32;
        match series {
            Series::Running => figures.running = figures.running.max(Some(count)),
            Series::Waiting => figures.waiting = figures.waiting.max(Some(count)),
            Series::KvUsage => figures.kv_usage = larger(figures.kv_usage, value),
            Series::CacheConfig => {
                figures.cache_tokens = figures.cache_tokens.max(config.tokens());
                figures.block_tokens = figures.block_tokens.max(config.block_size);
            }
            Series::SleepState if state_awake => figures.asleep = figures.asleep.max(Some(value == 0.0)),
            Series::PrefixQueries => figures.prefix_queries = larger(figures.prefix_queries, value),
            Series::SleepState | Series::ProcessStart => {}
        }
        Some(())
    }
}

fn larger(have: Option<f64>, value: f64) -> Option<f64> {
    Some(have.map_or(value, |have| have.max(value)))
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    str::from_utf8(text).ok()?.parse().ok()
}

/// What the labels of `vllm:cache_config_info` say.
#[derive(Default)]
struct CacheConfig {
    block_size: Option<u32>,
    blocks: Option<u64>,
    size_tokens: Option<u64>,
    no_prefix_caching: bool,
}

impl CacheConfig {
    fn take(&mut self, name: &[u8], value: &[u8]) {
        match name {
            b"block_size" => self.block_size = number(value),
            b"num_gpu_blocks" => self.blocks = number(value),
            b"kv_cache_size_tokens" => self.size_tokens = number(value),
            b"enable_prefix_caching" => self.no_prefix_caching = value == b"False",
            _ => {}
        }
    }

    fn tokens(&self) -> Option<u64> {
        if self.no_prefix_caching {
            return Some(0);
        }
        let product = || Some(self.blocks?.saturating_mul(u64::from(self.block_size?)));
        self.size_tokens.or_else(product)
    }
}

/// Gives `each` the labels in `rest` (`{name="value",…} value …`, or no labels), values unescaped; returns the
/// text of the series' value. `None` if this is no such line.
fn labels(rest: &[u8], mut each: impl FnMut(&[u8], &[u8])) -> Option<&[u8]> {
    let mut rest = rest.trim_ascii_start();
    if let Some(list) = rest.strip_prefix(b"{") {
        rest = list.trim_ascii_start();
        while !rest.starts_with(b"}") {
            let equals = memchr(b'=', rest)?;
            let name = rest.get(..equals)?.trim_ascii();
            let quoted = rest.get(equals + 1..)?.trim_ascii_start().strip_prefix(b"\"")?;
            let (value, behind) = unquoted(quoted)?;
            each(name, &value);
            rest = behind.trim_ascii_start();
            rest = match rest.strip_prefix(b",") {
                Some(next) => next.trim_ascii_start(),
                None if rest.starts_with(b"}") => rest,
                None => return None,
            };
        }
        rest = rest.get(1..)?.trim_ascii_start();
    }
    // a time stamp or an exemplar may follow
    rest.split(u8::is_ascii_whitespace).next().filter(|value| !value.is_empty())
}

/// The text up to the closing quote, its escapes undone, and what stands behind the quote.
fn unquoted(text: &[u8]) -> Option<(Cow<'_, [u8]>, &[u8])> {
    let mut end = 0;
    let mut escaped = false;
    loop {
        match text.get(end)? {
            b'"' => break,
            b'\\' => {
                escaped = true;
                end += 2;
            }
            _ => end += 1,
        }
    }
    let (value, behind) = (text.get(..end)?, text.get(end + 1..)?);
    if !escaped {
        return Some((Cow::Borrowed(value), behind));
    }
    let mut plain = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next()? {
                b'n' => b'\n',
                &other => other,
            },
            other => other,
        });
    }
    Some((Cow::Owned(plain), behind))
}

/// Requests that wait and the share of the KV cache in use, as the field `endpoint-load-metrics` of an answer
/// tells them (ORCA; vLLM sends it on demand, in one of two formats). `None` if it does not tell both.
pub fn parse_orca(value: &[u8]) -> Option<(u32, f64)> {
    if value.len() > MAX_ORCA_BYTES {
        return None;
    }
    let (format, rest) = value.split_at_checked(memchr(b' ', value)?)?;
    let metrics = match format {
        b"JSON" => serde_json::from_slice::<Orca>(rest).ok()?.named_metrics,
        b"TEXT" => OrcaMetrics::of_text(rest),
        _ => return None,
    };
    let waiting = metrics.num_requests_waiting.filter(|waiting| *waiting >= 0.0)?;
    let kv_usage = metrics.kv_cache_usage_perc.filter(|usage| *usage >= 0.0)?;
    Some((waiting as u32, kv_usage))
}

#[derive(Deserialize)]
struct Orca {
    named_metrics: OrcaMetrics,
}

#[derive(Default, Deserialize)]
struct OrcaMetrics {
    num_requests_waiting: Option<f64>,
    kv_cache_usage_perc: Option<f64>,
}

impl OrcaMetrics {
    fn of_text(text: &[u8]) -> Self {
        let mut metrics = Self::default();
        for part in text.split(|&byte| byte == b',') {
            let Some((name, value)) = memchr(b'=', part).and_then(|at| part.split_at_checked(at)) else {
                continue;
            };
            let value = value.get(1..).and_then(number);
            match name.trim_ascii() {
                b"named_metrics.num_requests_waiting" => metrics.num_requests_waiting = value,
                b"named_metrics.kv_cache_usage_perc" => metrics.kv_cache_usage_perc = value,
                _ => {}
            }
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vllm::golden;

    fn parse(text: &str) -> EngineReport {
        parse_engines(text.as_bytes())
    }

    #[test]
    fn a_golden_servers_metrics_are_read() {
        for case in ["get_metrics", "get_metrics_slash"] {
            let case = golden::case(&format!("py-0.32-default/{case}"));
            let report = parse_engines(case.answer_body());
            let expected = Figures {
                running: Some(0),
                waiting: Some(0),
                kv_usage: Some(0.0),
                cache_tokens: Some(2_097_152),
                block_tokens: Some(128),
                asleep: Some(false),
                prefix_queries: Some(24.0),
            };
            assert_eq!((report.engine(0), report.engine(1)), (Some(expected), None), "{}", case.name);
            assert_eq!(report.total(), expected);
            assert_eq!(report.process_start, Some(1_795_251_793.56));
        }
    }

    #[test]
    fn golden_answers_tell_their_load_in_both_formats() {
        let mut told = 0;
        for case in golden::all() {
            if let Some(value) = case.answer_header("endpoint-load-metrics") {
                assert_eq!(parse_orca(value.as_bytes()), Some((0, 0.0)), "{}", case.name);
                told += 1;
            }
        }
        assert!(told >= 4, "{told}");
    }

    /// Two engines, in the order of labels that either front end has, and old names.
    const TWO: &str = r#"
# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{model_name="m",engine="1"} 2.0 1795251793000
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m",} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{ engine = "1" , model_name = "m" } 0.5
vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",kv_cache_size_tokens="3200",num_gpu_blocks="None"} 1.0
vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="1",sleep_state="awake"} 0.0
vllm:engine_sleep_state{engine="0",sleep_state="discard_all"} 0.0
vllm:prefix_cache_queries_total{engine="0"} 1e3
vllm:prefix_cache_queries_total{engine="1"} 24
vllm:prefix_cache_queries_created{engine="1"} 1.7952518673032951e+09
process_start_time_seconds 1.79525179356e+09"#;

    #[test]
    fn engines_are_summed_and_one_is_told_when_asked() {
        let report = parse(TWO);
        let total = Figures {
            running: Some(5),
            waiting: Some(5),
            kv_usage: Some(0.5),
            cache_tokens: Some(4800),
            block_tokens: Some(16),
            asleep: Some(true),
            prefix_queries: Some(1024.0),
        };
        assert_eq!(report.total(), total);
        let first = report.engine(0).unwrap();
        assert_eq!((first.running, first.waiting, first.kv_usage), (Some(3), Some(1), Some(0.25)));
        assert_eq!((first.cache_tokens, first.asleep), (Some(1600), Some(false)));
        assert_eq!(report.engine(1).unwrap().cache_tokens, Some(3200));
        assert_eq!(report.engine(2), None);
    }

    #[test]
    fn an_engine_under_two_names_is_counted_once() {
        let report = parse(
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3\n\
             vllm:num_requests_running{engine=\"0\",model_name=\"lora\"} 2\n\
             vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a,b\"} 9\n",
        );
        assert_eq!(report.total().running, Some(3));
    }

    #[test]
    fn series_without_an_engine_are_those_of_the_only_one() {
        let report = parse("vllm:num_requests_running{model_name=\"m\"} 3\nvllm:num_requests_waiting 2\n");
        assert_eq!((report.total().running, report.total().waiting), (Some(3), Some(2)));
        assert_eq!(report.engine(0), None);
    }

    #[test]
    fn a_cache_without_prefixes_holds_nothing() {
        let report = parse(
            "vllm:cache_config_info{block_size=\"16\",enable_prefix_caching=\"False\",num_gpu_blocks=\"9\"} 1",
        );
        assert_eq!((report.total().cache_tokens, report.total().block_tokens), (Some(0), Some(16)));
    }

    #[test]
    fn labels_are_unescaped_and_cannot_feign_others() {
        let report = parse(concat!(
            r#"vllm:num_requests_running{model_name="a\"},engine=\"7\\",engine="1"} 2"#,
            "\n",
            r#"vllm:num_requests_waiting{model_name="a\\\n",engine="\u0031"} 3"#
        ));
        assert_eq!(report.engine(1).unwrap().running, Some(2));
        assert_eq!((report.engine(7), report.total().waiting), (None, Some(3)));
    }

    #[test]
    fn what_is_broken_is_skipped() {
        for line in [
            "vllm:num_requests_running",
            "vllm:num_requests_running ",
            "vllm:num_requests_running{",
            "vllm:num_requests_running{}",
            "vllm:num_requests_running{engine} 1",
            "vllm:num_requests_running{engine=\"0} 1",
            "vllm:num_requests_running{engine=\"0\\",
            "vllm:num_requests_running{engine=\"0\" model_name=\"m\"} 1",
            "vllm:num_requests_running{engine=\"0\"} x",
            "vllm:num_requests_running{engine=\"0\"} NaN",
            "vllm:num_requests_running{engine=\"0\"} -1",
            "vllm:num_requests_running_total 1",
            "<html>",
            "",
        ] {
            assert_eq!(parse(line), EngineReport::default(), "{line}");
            let followed = parse(&format!("{line}\nvllm:num_requests_waiting 1\r\n"));
            assert_eq!(followed.total().waiting, Some(1), "behind {line}");
        }
        assert_eq!(parse("vllm:num_requests_running +Inf").total().running, Some(u32::MAX));
        assert_eq!(parse_engines(b"\xff\xfe{\n\xff"), EngineReport::default());
    }

    #[test]
    fn engines_beyond_the_bound_are_not_kept() {
        use std::fmt::Write;
        let mut text = String::new();
        for engine in 0..2 * MAX_ENGINES {
            writeln!(text, "vllm:num_requests_running{{engine=\"{engine}\"}} 1").unwrap();
        }
        assert_eq!(parse(&text).total().running, Some(MAX_ENGINES as u32));
    }

    #[test]
    fn only_a_field_that_tells_both_is_believed() {
        let json = br#"JSON {"cpu": 1, "named_metrics": {"x": 1, "num_requests_waiting": 2.0, "kv_cache_usage_perc": 0.5}}"#;
        assert_eq!(parse_orca(json), Some((2, 0.5)));
        let text =
            b"TEXT a.b=1.0, named_metrics.kv_cache_usage_perc=0.5,named_metrics.num_requests_waiting=2.0";
        assert_eq!(parse_orca(text), Some((2, 0.5)));
        for wrong in [
            "",
            "JSON",
            "JSON {}",
            r#"JSON {"named_metrics":{"num_requests_waiting":2}}"#,
            "TEXT named_metrics.num_requests_waiting=2",
            "TEXT named_metrics.num_requests_waiting=x, named_metrics.kv_cache_usage_perc=0.5",
            "TEXT named_metrics.num_requests_waiting=NaN, named_metrics.kv_cache_usage_perc=0.5",
            "BIN abc",
        ] {
            assert_eq!(parse_orca(wrong.as_bytes()), None, "{wrong}");
        }
        let long = format!("TEXT {}", "a.b=1.0, ".repeat(1000));
        assert_eq!(parse_orca(long.as_bytes()), None);
    }
}
