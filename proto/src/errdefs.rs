//! The one table of error kinds and their wire codes, over gRPC and over ttrpc.
//!
//! Every error type of ours implements [`Classify`]; the edge turns it into a [`tonic::Status`] or
//! a ttrpc error here and nowhere else. Clients turn codes back into kinds and strip a trailing
//! `: <kind text>`, so a rendered message always ends with the kind's text.

use std::error::Error as StdError;
use std::fmt;

use prost::Message as _;
use prost_types::Any;

use crate::google::rpc;

/// Most bytes of details that are passed on. They travel in the trailers of an answer, for which
/// clients have a bound, and past which they would not even see the code.
const DETAILS_MAX_BYTES: usize = 8 << 10;

/// What went wrong, in the terms clients of containerd understand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is malformed.
    InvalidArgument,
    /// The named object does not exist.
    NotFound,
    /// An object of that name exists.
    AlreadyExists,
    /// The caller may not do this.
    PermissionDenied,
    /// A bound was reached.
    ResourceExhausted,
    /// The object is in a state that does not allow the call.
    FailedPrecondition,
    /// Two changes met; travels as `FailedPrecondition` with text `conflict`.
    Conflict,
    /// Nothing to change; travels as `FailedPrecondition` with text `not modified`.
    NotModified,
    /// Given up midway; the caller may try the whole again.
    Aborted,
    /// An offset or index outside the object.
    OutOfRange,
    /// The server lacks the method or the variant asked for.
    Unimplemented,
    /// An invariant broke, or the system failed.
    Internal,
    /// Try again: busy or not up.
    Unavailable,
    /// Data was lost or cut short.
    DataLoss,
    /// No or wrong credentials.
    Unauthenticated,
    /// The deadline passed.
    DeadlineExceeded,
    /// The caller went away.
    Cancelled,
    /// Anything without a class; runtime errors reach the client like this.
    Unknown,
}

/// Kind, gRPC code, and the text a message ends with (empty: nothing is appended).
const TABLE: [(ErrorKind, tonic::Code, &str); 18] = [
    (
        ErrorKind::InvalidArgument,
        tonic::Code::InvalidArgument,
        "invalid argument",
    ),
    (ErrorKind::NotFound, tonic::Code::NotFound, "not found"),
    (
        ErrorKind::AlreadyExists,
        tonic::Code::AlreadyExists,
        "already exists",
    ),
    (
        ErrorKind::PermissionDenied,
        tonic::Code::PermissionDenied,
        "permission denied",
    ),
    (
        ErrorKind::ResourceExhausted,
        tonic::Code::ResourceExhausted,
        "resource exhausted",
    ),
    (
        ErrorKind::FailedPrecondition,
        tonic::Code::FailedPrecondition,
        "failed precondition",
    ),
    (
        ErrorKind::Conflict,
        tonic::Code::FailedPrecondition,
        "conflict",
    ),
    (
        ErrorKind::NotModified,
        tonic::Code::FailedPrecondition,
        "not modified",
    ),
    (ErrorKind::Aborted, tonic::Code::Aborted, "aborted"),
    (
        ErrorKind::OutOfRange,
        tonic::Code::OutOfRange,
        "out of range",
    ),
    (
        ErrorKind::Unimplemented,
        tonic::Code::Unimplemented,
        "not implemented",
    ),
    (ErrorKind::Internal, tonic::Code::Internal, "internal"),
    (
        ErrorKind::Unavailable,
        tonic::Code::Unavailable,
        "unavailable",
    ),
    (ErrorKind::DataLoss, tonic::Code::DataLoss, "data loss"),
    (
        ErrorKind::Unauthenticated,
        tonic::Code::Unauthenticated,
        "unauthorized",
    ),
    (
        ErrorKind::DeadlineExceeded,
        tonic::Code::DeadlineExceeded,
        "",
    ),
    (ErrorKind::Cancelled, tonic::Code::Cancelled, ""),
    (ErrorKind::Unknown, tonic::Code::Unknown, ""),
];

impl ErrorKind {
    /// The gRPC code of this kind; ttrpc uses the same numbers.
    #[must_use]
    pub fn code(self) -> tonic::Code {
        self.row().1
    }

    /// The text that a message of this kind ends with; empty where none is customary.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.row().2
    }

    fn row(self) -> &'static (ErrorKind, tonic::Code, &'static str) {
        TABLE
            .iter()
            .find(|row| row.0 == self)
            .expect("every kind has a row")
    }

    /// The kind behind a code and message received from a peer.
    #[must_use]
    pub fn from_wire(code: tonic::Code, message: &str) -> Self {
        let mut found = Self::Unknown;
        for (kind, row_code, text) in TABLE {
            if row_code != code {
                continue;
            }
            if message == text
                || message
                    .strip_suffix(text)
                    .is_some_and(|m| m.ends_with(": "))
            {
                return kind;
            }
            if found == Self::Unknown {
                found = kind;
            }
        }
        found
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.text() {
            "" => match self {
                Self::DeadlineExceeded => "deadline exceeded",
                Self::Cancelled => "canceled",
                _ => "unknown",
            },
            text => text,
        })
    }
}

/// An error that knows its kind. Implemented by every error enum of ours.
pub trait Classify: StdError {
    /// The kind that decides the wire code.
    fn kind(&self) -> ErrorKind;

    /// What a peer said besides, for whoever understands it; see [`WireError::details`].
    fn details(&self) -> &[Any] {
        &[]
    }
}

/// An error received from, or meant for, a peer.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// The kind.
    pub kind: ErrorKind,
    /// The message, as received.
    pub message: String,
    /// Details of the status (`google.rpc.Status`), as received: further errors, causes, and what else
    /// a backend tells its clients. They mean nothing here and are handed on.
    pub details: Vec<Any>,
}

impl Classify for WireError {
    fn kind(&self) -> ErrorKind {
        self.kind
    }

    fn details(&self) -> &[Any] {
        &self.details
    }
}

impl WireError {
    /// An error of `kind` with `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            details: Vec::new(),
        }
    }

    /// What a peer is to know of `error`.
    pub fn of<E: Classify>(error: &E) -> Self {
        Self {
            kind: error.kind(),
            message: render(error),
            details: error.details().to_vec(),
        }
    }
}

impl From<tonic::Status> for WireError {
    fn from(status: tonic::Status) -> Self {
        Self {
            kind: ErrorKind::from_wire(status.code(), status.message()),
            message: status.message().to_owned(),
            // What does not decode is nobody's.
            details: rpc::Status::decode(status.details())
                .map(|status| bounded(status.details))
                .unwrap_or_default(),
        }
    }
}

impl From<ttrpc::Error> for WireError {
    /// A ttrpc status keeps its code; any transport error means that the peer is gone.
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let code = tonic::Code::from_i32(status.code.value());
                let details = status.details.into_iter().map(|detail| Any {
                    type_url: detail.type_url,
                    value: detail.value,
                });
                Self {
                    kind: ErrorKind::from_wire(code, &status.message),
                    message: status.message,
                    details: bounded(details.collect()),
                }
            }
            other => Self {
                kind: ErrorKind::Unavailable,
                message: format!("ttrpc: {other}"),
                details: Vec::new(),
            },
        }
    }
}

/// Details that fit into an answer: all of them or none, since half of them may say something else.
fn bounded(details: Vec<Any>) -> Vec<Any> {
    let bytes: usize = details
        .iter()
        .map(|detail| detail.type_url.len() + detail.value.len())
        .sum();
    if bytes > DETAILS_MAX_BYTES {
        return Vec::new();
    }
    details
}

/// The error and its sources joined by `: `, without repeating a source its parent already shows.
#[must_use]
pub fn render(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Message with the kind's text appended where it is missing.
#[must_use]
pub fn message_of(kind: ErrorKind, text: String) -> String {
    let suffix = kind.text();
    if suffix.is_empty() || text.ends_with(suffix) {
        text
    } else {
        format!("{text}: {suffix}")
    }
}

/// The gRPC status of an error: its source chain as text, its kind as code, a peer's details.
// Takes the error by value so that it can be handed to `map_err`.
#[allow(
    clippy::needless_pass_by_value,
    reason = "used as `map_err(into_status)`"
)]
pub fn into_status<E: Classify>(error: E) -> tonic::Status {
    let kind = error.kind();
    let message = message_of(kind, render(&error));
    let details = error.details();
    if details.is_empty() {
        return tonic::Status::new(kind.code(), message);
    }
    // Clients that look at the details take code and message from there as well.
    let status = rpc::Status {
        code: kind.code().into(),
        message: message.clone(),
        details: details.to_vec(),
    };
    tonic::Status::with_details(kind.code(), message, status.encode_to_vec().into())
}

/// The ttrpc error of an error; the same codes and texts as [`into_status`].
#[allow(
    clippy::needless_pass_by_value,
    reason = "used as `map_err(into_ttrpc)`"
)]
pub fn into_ttrpc<E: Classify>(error: E) -> ttrpc::Error {
    let kind = error.kind();
    let mut status = ttrpc_status(kind.code(), message_of(kind, render(&error)));
    if let ttrpc::Error::RpcStatus(status) = &mut status {
        status.details.extend(error.details().iter().map(|detail| {
            let mut packed = ttrpc::proto::Any::new();
            packed.type_url.clone_from(&detail.type_url);
            packed.value.clone_from(&detail.value);
            packed
        }));
    }
    status
}

/// A ttrpc error of a gRPC code and a message.
#[must_use]
pub fn ttrpc_status(code: tonic::Code, message: String) -> ttrpc::Error {
    use ttrpc::proto::Code as T;
    let code = match code {
        tonic::Code::Ok => T::OK,
        tonic::Code::Cancelled => T::CANCELLED,
        tonic::Code::Unknown => T::UNKNOWN,
        tonic::Code::InvalidArgument => T::INVALID_ARGUMENT,
        tonic::Code::DeadlineExceeded => T::DEADLINE_EXCEEDED,
        tonic::Code::NotFound => T::NOT_FOUND,
        tonic::Code::AlreadyExists => T::ALREADY_EXISTS,
        tonic::Code::PermissionDenied => T::PERMISSION_DENIED,
        tonic::Code::ResourceExhausted => T::RESOURCE_EXHAUSTED,
        tonic::Code::FailedPrecondition => T::FAILED_PRECONDITION,
        tonic::Code::Aborted => T::ABORTED,
        tonic::Code::OutOfRange => T::OUT_OF_RANGE,
        tonic::Code::Unimplemented => T::UNIMPLEMENTED,
        tonic::Code::Internal => T::INTERNAL,
        tonic::Code::Unavailable => T::UNAVAILABLE,
        tonic::Code::DataLoss => T::DATA_LOSS,
        tonic::Code::Unauthenticated => T::UNAUTHENTICATED,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for (kind, code, _) in TABLE {
            let message = message_of(kind, "snapshot x".to_owned());
            assert_eq!(ErrorKind::from_wire(code, &message), kind, "{message}");
        }
    }

    #[test]
    fn ttrpc_and_grpc_codes_agree() {
        for (kind, code, _) in TABLE {
            let back = WireError::from(into_ttrpc(WireError::new(kind, "x")));
            assert_eq!((back.kind, back.kind.code()), (kind, code));
        }
    }

    #[test]
    fn details_of_a_peer_are_handed_on() {
        let error = |bytes| WireError {
            details: vec![Any {
                type_url: "example.com/why".to_owned(),
                value: vec![7; bytes],
            }],
            ..WireError::new(ErrorKind::NotFound, "x")
        };
        let sent = error(5);
        let status = into_status(sent.clone());
        let whole = rpc::Status::decode(status.details()).unwrap();
        assert_eq!(
            (whole.code, whole.message.as_str()),
            (5, "x: not found"),
            "clients take all of it from here"
        );
        assert_eq!(WireError::from(status).details, sent.details);
        assert_eq!(
            WireError::from(into_ttrpc(sent.clone())).details,
            sent.details
        );
        assert_eq!(WireError::of(&sent).details, sent.details);
        let plain = into_status(WireError::new(ErrorKind::NotFound, "x"));
        assert!(plain.details().is_empty());
        // More than an answer can carry.
        let large = WireError::from(into_status(error(DETAILS_MAX_BYTES)));
        assert_eq!((large.kind, large.details.len()), (ErrorKind::NotFound, 0));
        // Nothing that decodes.
        let odd = tonic::Status::with_details(tonic::Code::NotFound, "x", vec![0xff; 3].into());
        assert!(WireError::from(odd).details.is_empty());
    }

    #[test]
    fn a_message_gets_its_class_text_once() {
        let text = message_of(ErrorKind::NotFound, "x: not found".to_owned());
        assert_eq!(text, "x: not found");
    }
}
