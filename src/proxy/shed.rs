//! Turning a client away at the door, when there is nothing left to serve it with.

use crate::{
    net::{Buffer, ReadHalf, WriteHalf},
    proxy::{Context, context::SMALL_BYTES, respond},
    telemetry::metrics::Shed,
};

/// How long a client that is turned away has to read why, in milliseconds. Its descriptor is needed.
const PATIENCE_MS: u64 = 100;

/// What a client that is turned away has sent is read no further: closing with unread bytes would reset the
/// connection and destroy the answer on its way (RFC 9112 §9.6).
const MOST_READ: usize = 64 * 1024;

/// Tells a client that there is no room for it, and closes its connection.
///
/// # Cancellation
/// The connection is closed.
pub async fn shed(cx: &Context, reader: ReadHalf, writer: WriteHalf, why: Shed) {
    cx.metrics().shed(why);
    let mut bytes = Vec::new();
    respond::crowded().write(&mut bytes, &cx.date(), false, false, false);
    let watch = cx.watches.watch();
    watch.limit(PATIENCE_MS, farewell(reader, writer, Buffer::from_slice(&bytes))).await.ok();
}

async fn farewell(mut reader: ReadHalf, mut writer: WriteHalf, answer: Buffer) {
    let (sent, mut buffer) = writer.write_all(answer).await;
    if sent.is_err() {
        return;
    }
    writer.finish().await;
    let mut read = 0;
    while read < MOST_READ {
        let got;
        buffer = Buffer::new(0, SMALL_BYTES);
        (got, buffer) = reader.read(buffer).await;
        match got {
            Ok(count) if count > 0 => read += count,
            _ => break,
        }
    }
    drop(buffer);
}
