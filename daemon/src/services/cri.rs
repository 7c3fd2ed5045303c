//! `runtime.v1.RuntimeService`: the two lists that a kubelet asks for all the time as bytes, the rest
//! by the generated server.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use lighter_cri::plugin::Gate;
use lighter_cri::runtime::RuntimeEdge;
use lighter_proto::runtime::v1::runtime_service_server::{RuntimeServiceServer, SERVICE_NAME};
use tonic::Request;
use tonic::body::Body;
use tonic::server::NamedService;

use super::encoded;
use crate::config::MessageLimits;

/// The service as it is served.
#[derive(Debug, Clone)]
pub(crate) struct CriEdge {
    service: RuntimeEdge,
    rest: RuntimeServiceServer<RuntimeEdge>,
    limits: MessageLimits,
}

impl CriEdge {
    /// Over the plugin behind `gate`.
    pub(crate) fn new(gate: Arc<Gate>, limits: MessageLimits) -> Self {
        let service = RuntimeEdge(gate);
        let rest = RuntimeServiceServer::new(service.clone())
            .max_decoding_message_size(limits.receive_bytes)
            .max_encoding_message_size(limits.send_bytes);
        Self {
            service,
            rest,
            limits,
        }
    }
}

impl NamedService for CriEdge {
    const NAME: &'static str = SERVICE_NAME;
}

impl tower::Service<http::Request<Body>> for CriEdge {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (service, limits) = (self.service.clone(), self.limits);
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        match method {
            "ListPodSandbox" => {
                let answer = move |request: Request<_>| service.list_pods(request.into_inner());
                encoded::unary(encoded::Unary(answer), limits, request).boxed()
            }
            "ListContainers" => {
                let answer =
                    move |request: Request<_>| service.list_containers(request.into_inner());
                encoded::unary(encoded::Unary(answer), limits, request).boxed()
            }
            _ => self.rest.call(request),
        }
    }
}
