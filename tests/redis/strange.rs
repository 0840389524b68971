//! What is no news of ours, what is no Redis, and a Redis that is far away or half closed.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use crate::redis::{PROMPTS, ask, chat, figure, is_up, known_again, of_others, on, peers, together};
use crate::support::{Gate, Io, NEWS, Variant, client, eventually, redis, variants, worker};

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

    /// A copy takes over whose clock is behind: what is added there is older than what was read last.
    fn a_stream_that_goes_back_in_time_is_read_from_its_beginning(v: Variant) {
        let redis = redis();
        let workers: Vec<_> = (0..3).map(|_| worker().start()).collect();
        let [first, second] = together(v, &redis, &workers);
        redis.ask::<()>(&["XADD", NEWS, "99999999999999-0", "x", "from the future"]);
        let read = |proxy| figure(proxy, "skipped_batches_total{reason=\"malformed\"}") == 1.0;
        eventually("both have read it", || read(&first) && read(&second));
        let mut client = redis.client_of("");
        redis::pipe()
            .atomic()
            .cmd("DEL").arg(NEWS)
            .cmd("XADD").arg(&[NEWS, "1-1", "x", "from the past"])
            .exec(&mut client)
            .unwrap();
        for proxy in [&first, &second] {
            eventually("it reads on", || {
                figure(proxy, "skipped_batches_total{reason=\"malformed\"}") == 2.0 && peers(proxy) == 1
            });
        }
        assert_eq!(known_again(&first, &second, &workers, &PROMPTS[..4]), 4);
    }

    fn the_stream_is_cut(v: Variant) {
        let redis = redis();
        let worker = [worker().start()];
        let proxy = on(v, &redis.url(), &worker).arg("--redis-stream-bytes", "65536").start();
        eventually("it is used", || is_up(&proxy));
        let mut junk = redis::pipe();
        for _ in 0..5000 {
            junk.cmd("XADD").arg(&[NEWS, "*", "x", "junk"]);
        }
        junk.exec(&mut redis.client_of("")).unwrap();
        // Redis cuts by whole nodes, of 100 entries each
        eventually("it is short again", || match redis.ask::<u32>(&["XLEN", NEWS]) {
            ..=1200 => Ok(()),
            length => Err(length),
        });
    }

    /// An answer takes longer than an interval: what others tell is read nevertheless, however much there is to tell.
    fn a_redis_that_is_far_away_is_heard(v: Variant) {
        let redis = redis();
        let workers: Vec<_> = (0..2).map(|_| worker().start()).collect();
        let far = Other::far_from(redis.address());
        let [first, second] =
            [(); 2].map(|()| on(v, &far.url(), &workers).arg("--sync-interval-ms", "5").start());
        let (over, heard) = (AtomicBool::new(false), || figure(&first, "received_events"));
        thread::scope(|scope| {
            // the scope waits for its threads, however this ends
            let _end = End(&over);
            for mut client in [first.client(), first.client()] {
                let over = &over;
                scope.spawn(move || {
                    while !over.load(Ordering::SeqCst) {
                        client.send(client::post("/v1/chat/completions", chat("Count", &["to ten"])));
                        client.response().expect(200);
                    }
                });
            }
            eventually("they hear each other", || is_up(&first) && peers(&first) == 1 && peers(&second) == 1);
            for round in 1..=5 {
                ask(&second, "Count", &["to ten"]);
                eventually("it is heard under load", || heard() >= f64::from(2 * round));
            }
            eventually("it is known how far it is", || figure(&first, "lag_seconds") >= 0.03);
        });
        assert_eq!((figure(&first, "losses"), figure(&second, "losses")), (0.0, 0.0));
    }

    /// Its clock was right when it was asked, and then set back by thirty years: ids of the stream are what counts.
    fn a_redis_whose_clock_was_set_back_is_heard(v: Variant) {
        let redis = redis();
        let workers: Vec<_> = (0..3).map(|_| worker().start()).collect();
        let earlier = Other::before(redis.address(), |answer| {
            // what TIME answers begins with seconds of ten digits, of which the first is a 1
            if let Some(rest) = answer.strip_suffix(b"\r\n")
                && let Some(at) = rest.windows(10).position(|seen| seen == b"*2\r\n$10\r\n1")
            {
                answer[at + 9] = b'2';
            }
        });
        let [first, second] = [(); 2].map(|()| on(v, &earlier.url(), &workers).start());
        for proxy in [&first, &second] {
            eventually("they hear each other", || is_up(proxy) && peers(proxy) == 1);
        }
    }

    /// It takes what it is told: that alone is no use of it, and nothing to be lost again and again.
    fn a_redis_that_may_only_be_written_is_not_used(v: Variant) {
        let redis = redis();
        let user = ["SETUSER", "me", "on", ">p", "~vllm-proxy:*", "+xadd", "+xrange", "+pexpire", "+time"];
        redis.ask::<()>(&[&["ACL"][..], &user].concat());
        let worker = [worker().start()];
        let proxy = on(v, &redis.url_of("me:p", 0), &worker).start();
        let refused = || {
            let stats = redis.ask::<String>(&["INFO", "commandstats"]);
            let xread = stats.lines().find(|line| line.starts_with("cmdstat_xread:"));
            let rejected = xread.and_then(|line| line.split_once("rejected_calls=")?.1.split(',').next());
            rejected.map_or(0, |count| count.parse::<u32>().unwrap())
        };
        eventually("it was tried thrice", || refused() >= 3);
        assert_eq!((is_up(&proxy), figure(&proxy, "losses")), (false, 0.0));
        proxy.client().chat("m").expect(200);
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

/// A fault of ours: the third batch panics, and the tenth.
#[test]
fn a_panic_of_the_sync_thread_costs_what_it_knew_of_others_and_no_request() {
    static BATCHES: AtomicUsize = AtomicUsize::new(0);
    let v = Variant { io: Io::Epoll, shards: 2 };
    let (redis, gate) = (redis(), Gate::new());
    let workers = [worker().holds(&gate).start()];
    let [peer] = together(v, &redis, &workers);
    let mut client = peer.client();
    client.send(client::post("/v1/chat/completions", client::chat("m")));
    eventually("it has arrived", || gate.waiting() == 1);
    let panics = || assert!(![3, 10].contains(&BATCHES.fetch_add(1, Ordering::SeqCst)), "on purpose");
    let proxy = on(v, &redis.url(), &workers).sync_fault(panics).start();
    eventually("it has happened twice", || BATCHES.load(Ordering::SeqCst) > 11);
    eventually("it is over", || is_up(&proxy) && figure(&proxy, "losses") == 2.0);
    eventually("it hears its peer", || peers(&proxy) == 1 && of_others(&proxy, &workers) == [1]);
    eventually("and is heard as one", || peers(&peer) == 1);
    gate.open();
    client.response().expect(200);
    eventually("nothing is left over", || of_others(&proxy, &workers) == [0]);
    proxy.client().chat("m").expect(200);
}

/// Somebody else at the place of a Redis.
struct Other {
    port: u16,
    count: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Other {
    /// Says the same to everybody, and hangs up.
    fn start(answer: &'static [u8]) -> Self {
        Self::serving(move |mut connection| {
            // who is not heard out resets the connection before he reads
            let heard = connection.read(&mut [0; 4096]).and_then(|_| connection.write_all(answer));
            drop(heard);
        })
    }

    /// Passes everything on, the answers late.
    fn far_from(redis: (Ipv4Addr, u16)) -> Self {
        Self::before(redis, |_| {
            let (_silent, clock) = mpsc::channel::<()>();
            // nothing comes: it is for the time that it takes
            clock.recv_timeout(Duration::from_millis(30)).unwrap_or_default();
        })
    }

    /// Passes everything on, and does something to answers.
    fn before(redis: (Ipv4Addr, u16), change: fn(&mut [u8])) -> Self {
        Self::serving(move |client| {
            let server = TcpStream::connect(redis).unwrap();
            let (asks, answers) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || pass(asks, server, |_| ()));
            thread::spawn(move || pass(answers, client, change));
        })
    }

    fn serving(serve: impl Fn(TcpStream) + Send + 'static) -> Self {
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
                serve(connection);
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

/// Says that it is over.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Copies from one connection to the other, until one of them ends.
fn pass(mut from: TcpStream, mut to: TcpStream, change: fn(&mut [u8])) {
    let mut buffer = [0; 1 << 16];
    while let Ok(1..) = from.read(&mut buffer).and_then(|length| {
        change(&mut buffer[..length]);
        to.write_all(&buffer[..length]).map(|()| length)
    }) {}
    // an error means that it has ended already
    to.shutdown(Shutdown::Both).ok();
    from.shutdown(Shutdown::Both).ok();
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
