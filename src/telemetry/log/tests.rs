use std::{
    fs::OpenOptions,
    io::{Read, Write},
    sync::{Arc, Mutex},
};

use super::{
    format::format,
    record::{Fields, Record, Value},
    *,
};

/// 2024-02-29T12:34:56.789Z.
const LEAP_DAY_MS: u64 = 1_709_210_096_789;

fn record<'a>(fields: &'a Fields, origin: &'a [(&'static str, Value)]) -> Record<'a> {
    Record { unix_ms: LEAP_DAY_MS, level: tracing::Level::INFO, fields, origin }
}

fn written(form: Format, message: &str, list: &[(&'static str, Value)]) -> String {
    let fields = Fields { message: message.to_owned(), list: list.to_vec() };
    String::from_utf8(format(&record(&fields, &[]), form, false)).unwrap()
}

fn text(value: &str) -> Value {
    Value::Text(value.to_owned())
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is written while `run` logs, with these settings, on a terminal or not.
fn logged(settings: &Settings, terminal: bool, run: impl FnOnce()) -> String {
    let memory = Memory::default();
    let (queue, thread) = WriterThread::start(memory.clone());
    let layer = RecordLayer::new(settings, terminal, queue);
    let level = settings.effective().level_filter();
    let subscriber = tracing_subscriber::registry().with(level).with(layer);
    tracing::subscriber::with_default(subscriber, run);
    drop(thread);
    let bytes = memory.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

fn settings(verbosity: Verbosity, format: Option<Format>) -> Settings {
    Settings { verbosity, log_format: format, no_color: true, ..Settings::default() }
}

#[test]
fn a_value_stays_a_field_in_every_format() {
    let fields = [("input", text("foo")), ("attempts", Value::Unsigned(2)), ("ok", Value::Bool(false))];
    assert_eq!(
        written(Format::Txt, "Failed to parse value", &fields),
        "2024-02-29T12:34:56.789Z [INFO] Failed to parse value: [input=\"foo\" attempts=2 ok=false]\n"
    );
    assert_eq!(
        written(Format::Json, "Failed to parse value", &fields),
        "{\"time\":\"2024-02-29T12:34:56.789Z\",\"level\":\"INFO\",\"message\":\"Failed to parse value\",\
         \"input\":\"foo\",\"attempts\":2,\"ok\":false}\n"
    );
    assert_eq!(
        written(Format::Yml, "Failed to parse value", &fields),
        "---\ntime: \"2024-02-29T12:34:56.789Z\"\nlevel: INFO\nmessage: \"Failed to parse value\"\n\
         input: \"foo\"\nattempts: 2\nok: false\n"
    );
}

#[test]
fn a_record_without_fields_has_no_brackets_after_it() {
    assert_eq!(written(Format::Txt, "up", &[]), "2024-02-29T12:34:56.789Z [INFO] up\n");
}

#[test]
fn nothing_in_a_value_or_message_makes_a_second_line() {
    let evil = "a\nb\r\n2024 [ERROR] forged\u{85}\u{2028}\u{2029}\u{1b}[2J\u{7f}\0\u{202e}\"\\";
    for form in [Format::Txt, Format::Json] {
        let line = written(form, evil, &[("path", text(evil))]);
        assert_eq!(line.matches(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count(), 1, "{line:?}");
        assert!(line.ends_with('\n'));
        assert!(!line.trim_end().chars().any(char::is_control), "{line:?}");
        assert!(!line.contains('\u{202e}'));
    }
    let json: serde_json::Value =
        serde_json::from_str(&written(Format::Json, evil, &[("p", text(evil))])).unwrap();
    assert_eq!((json["message"].as_str(), json["p"].as_str()), (Some(evil), Some(evil)));
    let yaml = written(Format::Yml, evil, &[("p", text(evil))]);
    assert_eq!(yaml.lines().count(), 5, "{yaml}");
}

#[test]
fn a_field_cannot_pass_for_a_part_of_the_record() {
    let line = written(Format::Json, "m", &[("level", text("ERROR")), ("yes", Value::Bool(true))]);
    assert!(line.contains("\"level\":\"INFO\"") && line.contains("\"level_\":\"ERROR\""), "{line}");
    assert!(written(Format::Yml, "m", &[("yes", Value::Bool(true))]).ends_with("\n\"yes\": true\n"));
}

#[test]
fn numbers_that_json_lacks_are_texts() {
    let line = written(Format::Json, "m", &[("x", Value::Float(f64::NAN)), ("y", Value::Float(1e20))]);
    assert!(line.ends_with("\"x\":\"NaN\",\"y\":100000000000000000000}\n"), "{line}");
}

#[test]
fn times_are_rfc_3339_in_utc() {
    // From `date -u -d @N`.
    for (unix_ms, shown) in [
        (0, "1970-01-01T00:00:00.000Z"),
        (951_782_399_999, "2000-02-28T23:59:59.999Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
        (1_735_689_599_000, "2024-12-31T23:59:59.000Z"),
        (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
    ] {
        let fields = Fields::default();
        let bytes = format(&Record { unix_ms, ..record(&fields, &[]) }, Format::Txt, false);
        assert!(bytes.starts_with(shown.as_bytes()), "{shown} {}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn the_ladder_has_six_rungs_and_ends() {
    let names = ["0", "warning", "INFO", "Debug", "verbose", "1"];
    let ladder = names.map(|name| name.parse::<Verbosity>().unwrap());
    assert!(ladder.is_sorted());
    for (at, verbosity) in ladder.into_iter().enumerate() {
        for (verbose, quiet) in [(0, 0), (1, 0), (0, 1), (2, 1), (9, 0), (0, 9), (255, 0)] {
            let to = (at + usize::from(verbose)).saturating_sub(usize::from(quiet)).min(5);
            let settings = Settings { verbosity, verbose, quiet, ..Settings::default() };
            assert_eq!(settings.effective(), ladder[to], "{verbosity} -v {verbose} -q {quiet}");
        }
    }
    for (name, same) in [("Loud", "1"), ("Quiet", "0"), ("ERROR", "0")] {
        assert_eq!(name.parse::<Verbosity>(), same.parse::<Verbosity>());
    }
    assert!("2".parse::<Verbosity>().is_err() && "".parse::<Verbosity>().is_err());
}

#[test]
fn each_rung_shows_what_it_says() {
    let run = || {
        tracing::trace!("t");
        tracing::info!("i");
        tracing::warn!("w");
        tracing::error!("e");
    };
    for (verbosity, shown) in [
        (Verbosity::Error, 1),
        (Verbosity::Warning, 2),
        (Verbosity::Info, 3),
        (Verbosity::Debug, 4),
        (Verbosity::Verbose, 4),
        (Verbosity::Loud, 4),
    ] {
        let lines = logged(&settings(verbosity, None), true, run);
        assert_eq!(lines.lines().count(), shown, "{lines}");
    }
}

#[test]
fn details_grow_with_the_rung_and_are_whole_for_errors_and_off_a_terminal() {
    let info = || tracing::info!("i");
    let show = |verbosity, terminal| logged(&settings(verbosity, Some(Format::Txt)), terminal, info);
    assert!(show(Verbosity::Debug, true).ends_with("[INFO] i\n"));
    let some = show(Verbosity::Verbose, true);
    assert!(some.contains("target=\"vllm_proxy::telemetry") && !some.contains("thread="), "{some}");
    for all in [show(Verbosity::Loud, true), show(Verbosity::Info, false)] {
        assert!(all.contains("target=") && all.contains("thread=") && all.contains("line="), "{all}");
    }
    let error = logged(&settings(Verbosity::Error, None), true, || tracing::error!("e"));
    assert!(error.contains("[ERROR] e: [target=") && error.contains("file=\"src/"), "{error}");
}

#[test]
fn text_on_a_terminal_and_json_elsewhere_unless_told_otherwise() {
    let info = || tracing::info!(worker = "a", "i");
    assert!(logged(&settings(Verbosity::Info, None), true, info).contains("[INFO] i: [worker=\"a\"]"));
    assert!(logged(&settings(Verbosity::Info, None), false, info).starts_with("{\"time\":"));
    assert!(logged(&settings(Verbosity::Info, Some(Format::Yml)), true, info).starts_with("---\n"));
}

#[test]
fn only_a_terminal_sees_colours() {
    let info = || tracing::info!("i");
    let coloured = Settings { log_format: Some(Format::Txt), ..Settings::default() };
    assert!(logged(&coloured, true, info).contains("\u{1b}[32m[INFO]\u{1b}[0m"));
    assert!(!logged(&coloured, false, info).contains('\u{1b}'));
    assert!(!logged(&Settings { no_color: true, ..coloured }, true, info).contains('\u{1b}'));
}

#[test]
fn fields_of_spans_come_before_those_of_the_event() {
    let line = logged(&settings(Verbosity::Info, None), true, || {
        let span = tracing::info_span!("exchange", shard = 1, worker = tracing::field::Empty);
        span.record("worker", "a");
        span.in_scope(|| tracing::info!(shard = 2, r#type = "x", "i"));
    });
    assert!(line.ends_with("[INFO] i: [shard=2 worker=\"a\" type=\"x\"]\n"), "{line}");
}

#[test]
fn an_error_tells_its_causes() {
    let cause = io::Error::new(io::ErrorKind::ConnectionRefused, "refused");
    let error = InitError::from(cause);
    let line = logged(&settings(Verbosity::Info, None), true, || {
        tracing::info!(error = &error as &dyn std::error::Error, "i");
    });
    assert!(line.contains("error=\"stdout cannot be used for logs: refused\""), "{line}");
}

#[test]
fn a_long_value_is_cut_at_a_character() {
    let line = logged(&settings(Verbosity::Info, None), true, || tracing::info!(v = "ä".repeat(9000), "i"));
    assert_eq!(line.matches('ä').count(), 2048);
    assert!(line.ends_with("ä…\"]\n"));
}

#[test]
fn a_closed_pipe_and_a_full_disk_cost_records_only() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let sinks: [Box<dyn Write + Send>; 2] = [Box::new(full), Box::new(io::pipe().unwrap().1)];
    for sink in sinks {
        let (mut queue, thread) = WriterThread::start(sink);
        let counts = thread.counts();
        for _ in 0..100 {
            queue.write_all(b"record\n").unwrap();
        }
        drop(thread);
        assert_eq!(counts.dropped(), 100);
    }
}

#[test]
fn a_disk_that_has_room_again_gets_the_next_record() {
    struct FullAtFirst(Memory, usize);
    impl Write for FullAtFirst {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1 <= 2 { Err(io::ErrorKind::StorageFull.into()) } else { self.0.write(buf) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let memory = Memory::default();
    let (mut queue, thread) = WriterThread::start(FullAtFirst(memory.clone(), 0));
    for line in ["1\n", "2\n", "3\n"] {
        queue.write_all(line.as_bytes()).unwrap();
    }
    let counts = thread.counts();
    drop(thread);
    assert_eq!((counts.dropped(), memory.0.lock().unwrap().as_slice()), (2, b"3\n".as_slice()));
}

#[test]
fn a_stdout_that_nobody_reads_blocks_neither_the_logger_nor_the_end() {
    let (mut reader, pipe) = io::pipe().unwrap();
    let (mut queue, thread) = WriterThread::start(pipe);
    let counts = thread.counts();
    // More than the queue and the pipe (64 KiB) hold together.
    let line = [b'x'; 1024];
    for _ in 0..10_000 {
        queue.write_all(&line).unwrap();
    }
    let dropped = counts.dropped();
    assert!((10_000 - 4096 - 1024..10_000).contains(&dropped), "{dropped} dropped");
    // Returns although the thread is stuck in its write.
    drop(thread);
    let mut first = [0; 1024];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(first, line, "what was queued first is written first");
}
