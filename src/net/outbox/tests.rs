use std::{net::TcpStream, thread};

use super::*;
use crate::net::{Runtime, Settings, WriteHalf, accept_from, give_way, listen, pause};

/// Runs `test` over epoll with `count` connections: where is written, and where that is read.
fn with_connections<F: Future<Output = ()>>(
    count: usize,
    test: impl FnOnce(Vec<(WriteHalf, TcpStream)>) -> F,
) {
    let mut runtime = Runtime::build(Driver::Epoll).unwrap();
    let off = Settings { tcp_keepalive_secs: 0, tcp_user_timeout_secs: 0 };
    let listener = listen("127.0.0.1:0".parse().unwrap(), 1, &off).unwrap().remove(0);
    let address = listener.local_addr().unwrap();
    runtime.block_on(async {
        let listener = accept_from(listener, Driver::Epoll).unwrap();
        let mut connections = Vec::new();
        for _ in 0..count {
            let client = TcpStream::connect(address).unwrap();
            connections.push((listener.accept().await.unwrap().1, client));
        }
        test(connections).await;
    });
}

/// Runs every task of `tasks` to its end.
async fn run_all<F: Future<Output = ()> + 'static>(tasks: impl IntoIterator<Item = F>) {
    let left = Rc::new(Cell::new(0));
    for task in tasks {
        left.set(left.get() + 1);
        let left = left.clone();
        spawn(async move {
            task.await;
            left.set(left.get() - 1);
        });
    }
    while left.get() > 0 {
        pause(1).await;
    }
}

#[test]
fn what_is_written_in_one_turn_arrives_each_on_its_connection_in_order() {
    const ROUNDS: usize = 5;
    // more than are given to the kernel at a time
    with_connections(BATCH + 7, async |connections| {
        let outbox = current().expect("there is AIO where this is tested");
        let most = Rc::new(Cell::new(0));
        let (writers, mut readers): (Vec<_>, Vec<_>) = connections.into_iter().unzip();
        run_all(writers.into_iter().enumerate().map(|(n, mut writer)| {
            let (outbox, most) = (outbox.clone(), most.clone());
            async move {
                for round in 0..ROUNDS {
                    let text = format!("{n:03}/{round};");
                    let (result, buffer) = writer.write_all(Buffer::from_slice(text.as_bytes())).await;
                    result.unwrap();
                    assert_eq!(buffer.filled(), text.as_bytes());
                    most.set(most.get().max(outbox.letters.borrow().len()));
                    // the first turn tells that the next ones may be worth it
                    give_way(false).await;
                }
            }
        }))
        .await;
        assert!(most.get() > BATCH, "they were not sent together");
        for (n, reader) in readers.iter_mut().enumerate() {
            let text: String = (0..ROUNDS).map(|round| format!("{n:03}/{round};")).collect();
            let mut read = vec![0; text.len()];
            reader.read_exact(&mut read).unwrap();
            assert_eq!(String::from_utf8(read).unwrap(), text);
        }
        assert_eq!(outbox.free.borrow().len(), outbox.letters.borrow().len(), "a letter was lost");
    });
}

#[test]
fn what_is_given_up_before_the_turn_ends_is_not_sent() {
    with_connections(1, async |mut connections| {
        let outbox = current().unwrap();
        let (writer, mut reader) = connections.remove(0);
        let fd = writer.fd();
        outbox.before.set(2);
        {
            let mut lost = pin!(outbox.write(fd, Buffer::from_slice(b"never")));
            let mut context = std::task::Context::from_waker(Waker::noop());
            assert!(lost.as_mut().poll(&mut context).is_pending());
        }
        let mut sent = pin!(outbox.write(fd, Buffer::from_slice(b"sent")));
        let (result, _) = sent.as_mut().await;
        assert_eq!(result.unwrap(), 4);
        let mut read = [0; 4];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"sent");
        assert_eq!(outbox.free.borrow().len(), 2, "a letter was lost");
    });
}

#[test]
fn a_reader_that_is_gone_is_an_error_and_more_than_fits_waits_for_its_reader() {
    const MANY: usize = 8 << 20;
    with_connections(3, async |connections| {
        let outbox = current().unwrap();
        outbox.before.set(2);
        let (writers, mut readers): (Vec<_>, Vec<_>) = connections.into_iter().unzip();
        let gone = readers.pop().unwrap();
        socket2::SockRef::from(&gone).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(gone);
        let reading: Vec<_> = readers
            .into_iter()
            .map(|mut reader| thread::spawn(move || reader.read_exact(&mut vec![0; MANY]).is_ok()))
            .collect();
        run_all(writers.into_iter().enumerate().map(|(n, mut writer)| async move {
            let (result, buffer) = writer.write_all(Buffer::from_slice(&vec![b'x'; MANY])).await;
            assert_eq!(result.is_ok(), n < 2, "{n}: {result:?}");
            assert_eq!(buffer.len(), MANY);
        }))
        .await;
        assert!(reading.into_iter().all(|reader| reader.join().unwrap()));
    });
}

#[test]
fn those_who_always_write_let_timers_run() {
    const MANY: u32 = 100_000;
    with_connections(2, async |connections| {
        let done = Rc::new(Cell::new(false));
        let rounds = Rc::new(Cell::new(0));
        let (writers, readers): (Vec<_>, Vec<_>) = connections.into_iter().unzip();
        for mut reader in readers {
            thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
        }
        let tell = done.clone();
        spawn(async move {
            pause(1).await;
            tell.set(true);
        });
        run_all(writers.into_iter().map(|mut writer| {
            let (done, rounds) = (done.clone(), rounds.clone());
            async move {
                while !done.get() && rounds.get() < MANY {
                    rounds.set(rounds.get() + 1);
                    writer.write_all(Buffer::from_slice(b"x")).await.0.unwrap();
                    give_way(false).await;
                }
            }
        }))
        .await;
        assert!(rounds.get() < MANY, "no timer was looked at");
    });
}

/// Makes the kernel refuse `call` with `ENOSYS` on this thread from now on.
fn refuse(call: libc::c_long) {
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let step = |code: u32, k: u32, jf: u8| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        // the number of the system call: the first field of seccomp_data
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(EQUAL, u32::try_from(call).unwrap(), 1),
        step(RETURN, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(), 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes no pointers.
    let no_new = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(no_new, 0);
    // SAFETY: the program is of the length said and is copied by the kernel.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

#[test]
fn where_aio_does_not_write_to_sockets_there_is_no_outbox() {
    for call in [libc::SYS_io_setup, libc::SYS_io_submit, libc::SYS_io_getevents] {
        let refused = thread::spawn(move || {
            refuse(call);
            with_connections(1, async |mut connections| {
                assert!(current().is_none(), "{call}");
                let (mut writer, mut reader) = connections.remove(0);
                writer.write_all(Buffer::from_slice(b"sent")).await.0.unwrap();
                let mut read = [0; 4];
                reader.read_exact(&mut read).unwrap();
                assert_eq!(&read, b"sent");
            });
        });
        refused.join().unwrap();
    }
}

/// Posts `texts`, each to its own socket: what is to be sent, and where that arrives.
fn posted(outbox: &Outbox, texts: &[&'static str]) -> (Vec<Order>, Vec<[UnixStream; 2]>) {
    let post = |text: &&'static str| {
        let pair: [UnixStream; 2] = UnixStream::pair().unwrap().into();
        let (fd, bytes, len) = (pair[0].as_raw_fd(), text.as_ptr(), text.len());
        let at = outbox.post(Letter::Posted { fd, bytes, len, waker: Waker::noop().clone() });
        (Order::write(at as u64, fd, bytes, len), pair)
    };
    let posted = texts.iter().map(post).unzip();
    outbox.posted.borrow_mut().clear();
    posted
}

/// What was told to who posted the first letters.
fn told(outbox: &Outbox) -> Vec<i64> {
    let told =
        |letter: &Letter| if let Letter::Sent(result) = letter { *result } else { panic!("{letter:?}") };
    outbox.letters.borrow().iter().map(told).collect()
}

#[test]
fn what_aio_refuses_once_it_has_taken_it_is_written_without_it() {
    with_connections(0, async |_| {
        let outbox = current().unwrap();
        let (mut orders, pairs) = posted(&outbox, &["one", "second", "third"]);
        // a socket has no offset: ESPIPE
        orders[1].offset = 1;
        assert_eq!(outbox.submit(&mut orders[1..2]), 1, "it is not refused at once");
        assert_eq!(outbox.results(&mut [Done::default()])[0].result, -i64::from(libc::ESPIPE));
        outbox.give(&mut orders, |_| ());
        assert_eq!(told(&outbox), [3, 6, 5]);
        for ([_, mut inner], text) in pairs.into_iter().zip(["one", "second", "third"]) {
            let mut read = vec![0; text.len()];
            inner.read_exact(&mut read).unwrap();
            assert_eq!(read, text.as_bytes());
        }
    });
}

#[test]
fn who_is_not_told_a_result_fails_and_aio_is_not_used_again() {
    let broken = thread::spawn(|| {
        with_connections(2, async |connections| {
            let outbox = current().unwrap();
            let (mut orders, _pairs) = posted(&outbox, &["one", "second", "third"]);
            refuse(libc::SYS_io_getevents);
            outbox.give(&mut orders, |_| ());
            assert_eq!(told(&outbox), [NO_RESULT; 3]);
            assert_eq!(outbox.submit(&mut orders), 0);
            run_all(connections.into_iter().map(|(mut writer, mut reader)| {
                let outbox = outbox.clone();
                async move {
                    outbox.before.set(2);
                    writer.write_all(Buffer::from_slice(b"sent")).await.0.unwrap();
                    let mut read = [0; 4];
                    reader.read_exact(&mut read).unwrap();
                    assert_eq!(&read, b"sent");
                }
            }))
            .await;
            assert_eq!(outbox.letters.borrow().len(), 3, "a letter was posted");
        });
    });
    broken.join().unwrap();
}

#[test]
fn those_who_wait_when_aio_breaks_are_written_to_and_told() {
    with_connections(0, async |_| {
        let outbox = current().unwrap();
        let (mut orders, mut pairs) = posted(&outbox, &["one", "second"]);
        outbox.end();
        let woken = Cell::new(0);
        outbox.give(&mut orders, |_| woken.set(woken.get() + 1));
        assert_eq!(told(&outbox), [3, 6]);
        assert_eq!(woken.get(), 2);
        let mut read = [0; 6];
        pairs[1][1].read_exact(&mut read).unwrap();
        assert_eq!(&read, b"second");
    });
}

#[test]
fn without_a_bell_nobody_sleeps() {
    let deaf = thread::spawn(|| {
        with_connections(2, async |mut connections| {
            let outbox = current().unwrap();
            // the bell is listened to before its calls fail
            give_way(false).await;
            refuse(libc::SYS_recvfrom);
            for round in 0..2 {
                outbox.turns.set(TURNS_AT_ONCE);
                let (back, written) = (Rc::new(RefCell::new(Vec::new())), b"sent");
                run_all(connections.drain(..).map(|(mut writer, reader)| {
                    let (back, outbox) = (back.clone(), outbox.clone());
                    async move {
                        outbox.before.set(2);
                        writer.write_all(Buffer::from_slice(written)).await.0.unwrap();
                        back.borrow_mut().push((writer, reader));
                    }
                }))
                .await;
                connections.append(&mut back.borrow_mut());
                assert_eq!(connections.len(), 2);
                assert!(outbox.broken.get(), "round {round}");
                assert!(outbox.sleepers.borrow().is_empty(), "round {round}");
            }
            for (_writer, reader) in connections {
                // with read, where a socket uses recv
                let mut reader = std::fs::File::from(std::os::fd::OwnedFd::from(reader));
                let mut read = [0; 8];
                reader.read_exact(&mut read).unwrap();
                assert_eq!(&read, b"sentsent");
            }
        });
    });
    deaf.join().unwrap();
}

#[test]
fn a_shard_that_ends_lets_go_of_those_who_still_write() {
    let mut ends = Vec::new();
    for sleeping in [false, true] {
        with_connections(2, async |connections| {
            let outbox = current().unwrap();
            ends.push(Rc::downgrade(&outbox));
            // a turn of its own, after which it is known who flushes
            give_way(false).await;
            if sleeping {
                outbox.turns.set(TURNS_AT_ONCE);
            }
            for (mut writer, reader) in connections {
                let outbox = Rc::downgrade(&outbox);
                spawn(async move {
                    outbox.upgrade().unwrap().before.set(2);
                    writer.write_all(Buffer::from_slice(b"sent")).await.0.unwrap();
                    drop(reader);
                });
            }
            let posted = || outbox.posted.borrow().len() == 2;
            poll_fn(|_| if posted() { Poll::Ready(()) } else { Poll::Pending }).await;
            // what follows is the end of the turn, which puts them to sleep
            if !sleeping {
                outbox.close();
            }
        });
    }
    for (case, end) in ends.iter().enumerate() {
        assert!(end.upgrade().is_none(), "case {case}: a writer is still there");
    }
}
