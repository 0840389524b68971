//! What is no news of ours, and what is no Redis.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use crate::redis::{PROMPTS, figure, is_up, known_again, on, together};
use crate::support::{NEWS, eventually, redis, variants, worker};

variants! {
    fn what_others_have_added_to_the_stream_is_skipped(v: Variant) {
        let redis = redis();
        let workers: Vec<_> = (0..3).map(|_| worker().start()).collect();
        let [first, second] = together(v, &redis, &workers);
        let mut client = redis.client_of("");
        let mut add = |field: &str, value: &[u8]| {
            redis::cmd("XADD").arg(NEWS).arg("*").arg(field).arg(value).exec(&mut client).unwrap();
        };
        let skipped = |reason: &str| figure(&second, &format!("skipped_batches_total{{reason=\"{reason}\"}}"));
        add("b", b"\x02 of another version");
        add("b", &[0xff; 4096]);
        eventually("another version is skipped", || skipped("version") == 2.0);
        add("b", b"");
        add("x", b"no batch");
        add("b", b"\x01");
        add("b", &[&[1][..], &[0x80; 300]].concat());
        eventually("what is malformed is skipped", || skipped("malformed") == 4.0);
        let mut noise = 17_u64;
        for length in 0..200_usize {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (noise >> 33) as u8
                })
                .collect();
            add("b", &[&[1][..], &bytes].concat());
        }
        assert_eq!(known_again(&first, &second, &workers, &PROMPTS[..4]), 4);
        assert!([&first, &second].iter().all(|proxy| is_up(proxy) && figure(proxy, "losses") == 0.0));
    }

    /// A port that was mistyped, or somebody who is not who he says.
    fn what_answers_and_is_no_redis_is_not_used(v: Variant) {
        let worker = [worker().start()];
        for answer in [
            &b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"[..],
            b"+OK\r\n+OK\r\n+OK\r\n",
            b"+OK\r\n*2\r\n$1\r\nx\r\n$1\r\ny\r\n",
            b"$-7\r\n*-7\r\n",
            b"*99999999999999999999\r\n",
            b"$99999999999\r\n",
            b"*1000000000000\r\n",
            b"\x00\x01\x02\r\n",
            b"%9223372036854775807\r\n",
            b"+OK\r\n*2\r\n$20\r\n99999999999999999999\r\n$1\r\n0\r\n",
            b"",
        ] {
            let other = Other::start(answer);
            let proxy = on(v, &other.url(), &worker).start();
            eventually("it was tried again", || other.count() >= 2);
            proxy.client().chat("m").expect(200);
            assert!(!is_up(&proxy), "{}", answer.escape_ascii());
        }
    }
}

/// Something that says the same to everybody, and hangs up.
struct Other {
    port: u16,
    count: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Other {
    fn start(answer: &'static [u8]) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (count, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counts, ends) = (count.clone(), over.clone());
        let thread = thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                if ends.load(Ordering::SeqCst) {
                    break;
                }
                counts.fetch_add(1, Ordering::SeqCst);
                let mut connection = connection;
                // who is not heard out resets the connection before he reads
                let heard = connection.read(&mut [0; 4096]).and_then(|_| connection.write_all(answer));
                drop(heard);
            }
        });
        Self { port, count, over, thread: Some(thread) }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // it waits for a connection
        drop(std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
