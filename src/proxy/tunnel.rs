//! A connection whose protocol was switched.

use std::{future::poll_fn, pin::pin, task::Poll};

use crate::{
    net::{Buffer, Parting},
    proxy::{
        client::Outlet,
        context::{Context, LARGE_BYTES},
        inbox::Inbox,
    },
    upstream::Connection,
};

/// After 101 both sides say what they like (RFC 9110 §7.8), until one of them closes.
///
/// # Cancellation
/// Both connections must be closed.
pub(super) async fn tunnel(
    cx: &Context,
    outlet: &mut Outlet<'_>,
    inbox: &Inbox,
    connection: &mut Connection,
    head: &[u8],
    first: Buffer,
) {
    let Connection { reader, writer, .. } = connection;
    // a conversation takes as long as it takes
    outlet.watch.set_total(0);
    outlet.watch.set_parting(Parting::Silent);
    let watch = outlet.watch.clone();
    let limit = cx.settings.worker_write_timeout_secs.saturating_mul(1000);
    let mut down = pin!(async {
        let mut buffer = Buffer::new(head.len(), first.len() + LARGE_BYTES);
        buffer.append(first.filled());
        buffer.prepend(head);
        loop {
            let Ok(sent) = outlet.send(buffer).await else { return };
            buffer = sent;
            buffer.reset(0);
            let result;
            (result, buffer) = reader.read(|| buffer).await;
            if !matches!(result, Ok(count) if count > 0) {
                return;
            }
        }
    });
    let mut up = pin!(async {
        while let Ok(buffer) = inbox.next().await {
            let written = writer.write_all_within(buffer, &watch, limit).await;
            let Ok((Ok(()), buffer)) = written else { return };
            cx.buffers.recycle(buffer);
        }
    });
    poll_fn(|context| {
        if up.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        down.as_mut().poll(context)
    })
    .await;
}
