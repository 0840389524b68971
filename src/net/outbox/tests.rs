use std::{io::Read, net::TcpStream, thread};

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
