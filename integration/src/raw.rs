//! Requests as bytes, to any method by name: for clients that do not keep to the types.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes};
use lighter_proto::FILE_DESCRIPTOR_SET;
use prost_reflect::{DescriptorPool, MessageDescriptor};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

use crate::{Client, Result};

/// Longest that a first answer is waited for: some streams stay open until something happens.
const PATIENCE: Duration = Duration::from_millis(500);

/// A method that a client can call over gRPC.
#[derive(Debug, Clone)]
pub struct Method {
    /// `package.Service/Method`
    pub name: String,
    /// What it is asked with.
    pub input: MessageDescriptor,
}

/// Every method of the API, CRI's included, by name.
///
/// # Errors
/// When the descriptors are damaged.
pub fn methods() -> Result<Vec<Method>> {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET)?;
    let mut methods = Vec::new();
    for service in pool.services() {
        let package = service.package_name();
        // The others are spoken over ttrpc, between daemon, shims and plugins.
        let served = package.starts_with("containerd.services.") && !package.contains("ttrpc")
            || package == "runtime.v1";
        if served {
            methods.extend(service.methods().map(|method| Method {
                name: format!("{}/{}", service.full_name(), method.name()),
                input: method.input(),
            }));
        }
    }
    methods.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(methods)
}

/// Sends one message and waits for the first answer; `None` when there is none yet.
///
/// # Errors
/// When the connection is lost before the call.
pub async fn call(
    client: &Client,
    method: &str,
    message: Bytes,
) -> Result<Option<Result<(), Status>>> {
    let mut grpc = tonic::client::Grpc::new(client.channel()).max_encoding_message_size(usize::MAX);
    grpc.ready().await?;
    let path = format!("/{method}").parse()?;
    let mut request = Request::new(tokio_stream::once(message));
    let namespace = client.namespace().parse()?;
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace);
    let called = async {
        let mut answers = grpc.streaming(request, path, Raw).await?.into_inner();
        answers.message().await.map(drop)
    };
    Ok(tokio::time::timeout(PATIENCE, called).await.ok())
}

/// Messages as the bytes they are.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let count = input.remaining();
        Ok(Some(input.copy_to_bytes(count)))
    }
}
