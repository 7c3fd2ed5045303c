//! Streams beside a call: what does not fit into one message, and how it goes on.

use lighter_proto::any;
use lighter_proto::containerd::services::streaming::v1::StreamInit;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Client;

/// Messages on their way to the daemon.
const OUTGOING: usize = 64;

impl Client {
    /// Opens the stream `id`: where to send, and what comes.
    ///
    /// # Errors
    /// The daemon's status.
    ///
    /// # Panics
    /// When the daemon takes the stream with anything but an empty message.
    pub async fn open_stream(
        &self,
        id: &str,
    ) -> Result<(mpsc::Sender<Any>, Streaming<Any>), Status> {
        let (requests, outgoing) = mpsc::channel(OUTGOING);
        let init = any::pack(&StreamInit { id: id.to_owned() });
        requests.send(init).await.expect("there is room");
        let outgoing = ReceiverStream::new(outgoing);
        let mut answers = self.streaming().stream(outgoing).await?.into_inner();
        let ready = answers.message().await?.expect("an answer to the init");
        assert!(any::is(&ready, "google.protobuf.Empty"), "{ready:?}");
        Ok((requests, answers))
    }
}
