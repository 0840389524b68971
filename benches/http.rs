//! What HTTP/1.1 costs without a socket: reading heads, writing them anew, following a chunked stream; and what the
//! codec of monoio-http takes for the same bytes, so that the choice against it can be looked at again.
//!
//! The codec does less: it neither looks for bare line ends nor for a second framing field, and a chunk is no data for
//! it until all of it is there. Its input is copied into a buffer of its own kind before the clock runs.

mod cpu_time;

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use cpu_time::CpuTime;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use futures_util::FutureExt;
use monoio::{
    BufResult,
    buf::{IoBuf, IoVecBuf},
    io::{AsyncWriteRent, sink::Sink},
};
use monoio_codec::{Decoded, Decoder};
use monoio_http::{
    common::{request::Request, response::Response},
    h1::{
        codec::{
            decoder::{
                ChannelWrapper, ChunkedBodyDecoder, GenericHeadDecoder, RequestHeadDecoder,
                ResponseHeadDecoder,
            },
            encoder::GenericEncoder,
        },
        payload::Payload,
    },
};
use vllm_proxy::http::{
    ChunkTracker, DownstreamHead, OutFraming, RequestHead, ResponseHead, UpstreamHead, Version,
};

/// What openai-python 1.x sends.
const OPENAI: &str = "POST /v1/chat/completions HTTP/1.1\r\n\
    Host: vllm.example.com:8000\r\n\
    Accept-Encoding: gzip, deflate\r\n\
    Connection: keep-alive\r\n\
    Accept: application/json\r\n\
    Content-Type: application/json\r\n\
    User-Agent: OpenAI/Python 1.109.1\r\n\
    X-Stainless-Lang: python\r\n\
    X-Stainless-Package-Version: 1.109.1\r\n\
    X-Stainless-OS: Linux\r\n\
    X-Stainless-Arch: x64\r\n\
    X-Stainless-Runtime: CPython\r\n\
    X-Stainless-Runtime-Version: 3.12.3\r\n\
    Authorization: Bearer sk-0123456789abcdef0123456789abcdef\r\n\
    X-Stainless-Async: async:asyncio\r\n\
    x-stainless-retry-count: 0\r\n\
    x-stainless-read-timeout: 600\r\n\
    Content-Length: 1187\r\n\r\n";

/// What curl 8 sends.
const CURL: &str = "POST /v1/chat/completions HTTP/1.1\r\n\
    Host: vllm.example.com:8000\r\n\
    User-Agent: curl/8.14.1\r\n\
    Accept: */*\r\n\
    content-type: application/json\r\n\
    Content-Length: 87\r\n\r\n";

/// What vLLM's Python front end, on uvicorn, answers with JSON.
const JSON: &str = "HTTP/1.1 200 OK\r\n\
    date: Sat, 21 Nov 2026 09:10:10 GMT\r\n\
    server: uvicorn\r\n\
    content-length: 621\r\n\
    content-type: application/json\r\n\r\n";

/// And with a stream.
const STREAM: &str = "HTTP/1.1 200 OK\r\n\
    date: Sat, 21 Nov 2026 09:10:10 GMT\r\n\
    server: uvicorn\r\n\
    content-type: text/event-stream; charset=utf-8\r\n\
    transfer-encoding: chunked\r\n\r\n";

/// So few inputs that they stay in the processor's cache, and enough for the clock's own time to vanish.
const BATCH: BatchSize = BatchSize::NumIterations(100);

const REQUESTS: [(&str, &str); 2] = [("openai", OPENAI), ("curl", CURL)];
const RESPONSES: [(&str, &str); 2] = [("json", JSON), ("stream", STREAM)];

type CodecRequests = GenericHeadDecoder<Request, RequestHeadDecoder, ChannelWrapper>;
type CodecResponses = GenericHeadDecoder<Response, ResponseHeadDecoder, ChannelWrapper>;

/// A socket that takes everything.
#[derive(Default)]
struct Sunk(usize);

impl AsyncWriteRent for Sunk {
    async fn write<T: IoBuf>(&mut self, buf: T) -> BufResult<usize, T> {
        self.0 += buf.bytes_init();
        (Ok(buf.bytes_init()), buf)
    }

    async fn writev<T: IoVecBuf>(&mut self, bufs: T) -> BufResult<usize, T> {
        (Err(std::io::ErrorKind::Unsupported.into()), bufs)
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    async fn shutdown(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The message that the codec finds whole, without its body.
fn decode<D: Decoder<Item = (M, N)>, M, N>(decoder: &mut D, mut bytes: BytesMut) -> M {
    match decoder.decode(&mut bytes) {
        Ok(Decoded::Some((message, _))) => message,
        _ => panic!("the codec does not read it"),
    }
}

/// What does it take to read a request's head, and what to read it and write it for a worker?
fn requests(c: &mut Criterion<CpuTime>) {
    for (client, text) in REQUESTS {
        let mut group = c.benchmark_group(format!("request_head/{client}"));
        let (mut head, mut out) = (RequestHead::default(), Vec::new());
        group.bench_function("read", |b| b.iter(|| head.parse(black_box(text.as_bytes()))));
        assert_eq!(head.parse(text.as_bytes()), Ok(Some(text.len())));
        group.bench_function("rewrite", |b| {
            b.iter(|| {
                let read = head.parse(black_box(text.as_bytes()));
                out.clear();
                let upstream = UpstreamHead { prefix: "", framing: OutFraming::AsReceived, extra: &[] };
                head.write_upstream(&mut out, &upstream);
                (read, out.len())
            });
        });
        assert!(out.starts_with(b"POST /v1/chat") && out.ends_with(b"\r\n\r\n"));

        let (mut codec, input) = (CodecRequests::default(), || BytesMut::from(text));
        group.bench_function("monoio_http_read", |b| {
            b.iter_batched(input, |bytes| drop(decode(&mut codec, bytes)), BATCH);
        });
        let mut encoder = GenericEncoder::new(Sunk::default());
        group.bench_function("monoio_http_rewrite", |b| {
            b.iter_batched(
                input,
                |bytes| {
                    let request: Request = decode(&mut codec, bytes).map(|_| Payload::None);
                    let sent = encoder.send(request).now_or_never();
                    let flushed = Sink::<Request>::flush(&mut encoder).now_or_never();
                    assert!(matches!((sent, flushed), (Some(Ok(())), Some(Ok(())))));
                },
                BATCH,
            );
        });
    }
}

/// What does it take to read the head of an answer, and what to read it and write it for a client?
fn responses(c: &mut Criterion<CpuTime>) {
    for (kind, text) in RESPONSES {
        let mut group = c.benchmark_group(format!("response_head/{kind}"));
        let (mut head, mut out) = (ResponseHead::default(), Vec::new());
        group.bench_function("read", |b| b.iter(|| head.parse(black_box(text.as_bytes()), false)));
        assert_eq!(head.parse(text.as_bytes(), false), Ok(Some(text.len())));
        let downstream = DownstreamHead {
            version: Version::Http11,
            framing: OutFraming::AsReceived,
            keep_alive: true,
            extra: &[],
        };
        group.bench_function("rewrite", |b| {
            b.iter(|| {
                let read = head.parse(black_box(text.as_bytes()), false);
                out.clear();
                head.write_downstream(&mut out, &downstream);
                (read, out.len())
            });
        });
        assert_eq!(out.escape_ascii().to_string(), text.escape_default().to_string());

        let (mut codec, input) = (CodecResponses::default(), || BytesMut::from(text));
        group.bench_function("monoio_http_read", |b| {
            b.iter_batched(input, |bytes| drop(decode(&mut codec, bytes)), BATCH);
        });
        let mut encoder = GenericEncoder::new(Sunk::default());
        group.bench_function("monoio_http_rewrite", |b| {
            b.iter_batched(
                input,
                |bytes| {
                    let response: Response = decode(&mut codec, bytes).map(|_| Payload::None);
                    let sent = encoder.send(response).now_or_never();
                    let flushed = Sink::<Response>::flush(&mut encoder).now_or_never();
                    assert!(matches!((sent, flushed), (Some(Ok(())), Some(Ok(())))));
                },
                BATCH,
            );
        });
    }
}

/// A streamed chat completion of 200 events, each a chunk.
fn events() -> Vec<Bytes> {
    let event = |at: usize| {
        let json = format!(
            r#"{{"id":"chatcmpl-7d1c0c1f2a3b4c5d","object":"chat.completion.chunk","created":1795252211,"model":"my-model","choices":[{{"index":0,"delta":{{"content":" token{at}"}},"logprobs":null,"finish_reason":null}}]}}"#
        );
        let data = format!("data: {json}\n\n");
        Bytes::from(format!("{:x}\r\n{data}\r\n", data.len()))
    };
    let mut events: Vec<Bytes> = (0..199).map(event).collect();
    events.push(Bytes::from("e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"));
    events
}

/// What does it take to follow a stream of 200 events to its end, if it comes in one read and in one for each?
fn chunks(c: &mut Criterion<CpuTime>) {
    let events = events();
    for (reads, pieces) in [("one_read", vec![Bytes::from(events.concat())]), ("200_reads", events)] {
        let mut group = c.benchmark_group(format!("chunks/200_events/{reads}"));
        let track = || {
            let mut tracker = ChunkTracker::new();
            let data: usize =
                pieces.iter().map(|piece| tracker.track(black_box(piece)).map_or(0, |read| read.data)).sum();
            (tracker.is_done(), data)
        };
        group.bench_function("track", |b| b.iter(track));
        let input = || pieces.iter().map(|piece| BytesMut::from(&piece[..])).collect::<Vec<_>>();
        let decode = |mut pieces: Vec<BytesMut>| {
            let (mut decoder, mut done, mut data) = (ChunkedBodyDecoder::default(), false, 0);
            for piece in &mut pieces {
                while let Ok(Decoded::Some(chunk)) = decoder.decode(piece) {
                    done = chunk.is_none();
                    data += chunk.map_or(0, |chunk| chunk.len());
                }
            }
            ((done, data), pieces)
        };
        group.bench_function("monoio_http_decode", |b| b.iter_batched(input, decode, BATCH));
        assert_eq!((track(), track().0), (decode(input()).0, true), "both find all of it");
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = requests, responses, chunks
}
criterion_main!(benches);
