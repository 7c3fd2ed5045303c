//! How a shim is reached: what its `start` action answers, and what is kept in the bundle.

use lighter_proto::containerd::runtime::bootstrap::v1::BootstrapResult;
use lighter_proto::errdefs::{ErrorKind, WireError};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::error::Error;

/// Newest version of the shim protocol spoken here.
const NEWEST: u32 = 3;

/// What is spoken on a shim's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// ttrpc.
    Ttrpc,
    /// gRPC.
    Grpc,
}

/// How a shim is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Version of the protocol: 2 or 3.
    pub version: u32,
    /// `unix://…`, `vsock://…`, or the name of an abstract socket.
    pub address: String,
    /// What is spoken there.
    pub protocol: Protocol,
}

#[derive(Deserialize)]
struct Json {
    #[serde(default)]
    version: u32,
    #[serde(default)]
    address: String,
    #[serde(default)]
    protocol: String,
}

impl Bootstrap {
    /// Reads an answer in any of its three forms: protobuf, JSON, a bare address.
    ///
    /// # Errors
    /// When it is none of them, or of a version or protocol that is not spoken here.
    pub fn parse(answer: &[u8]) -> Result<Self, Error> {
        if let Ok(result) = BootstrapResult::decode(answer)
            // Text can look like a message of unknown fields: a real one names its protocol.
            && matches!(result.protocol.as_str(), "ttrpc" | "grpc")
        {
            let version = u32::try_from(result.version).unwrap_or_default();
            return Self::checked(version, &result.address, &result.protocol);
        }
        let text = std::str::from_utf8(answer)
            .map_err(|_| Error::Start {
                reason: "the shim's answer is neither a message nor text".to_owned(),
            })?
            .trim();
        if let Ok(json) = serde_json::from_str::<Json>(text)
            && json.version >= 2
        {
            return Self::checked(json.version, &json.address, &json.protocol);
        }
        Self::checked(2, text, "ttrpc")
    }

    fn checked(version: u32, address: &str, protocol: &str) -> Result<Self, Error> {
        if version > NEWEST {
            return Err(WireError::new(
                ErrorKind::Unimplemented,
                format!("unsupported shim version ({version})"),
            )
            .into());
        }
        if address.is_empty() || address.contains(char::is_whitespace) {
            return Err(Error::Start {
                reason: format!("the shim answered no address: {address:?}"),
            });
        }
        let protocol = match protocol {
            "" | "ttrpc" => Protocol::Ttrpc,
            "grpc" => Protocol::Grpc,
            other => {
                return Err(WireError::new(
                    ErrorKind::Unimplemented,
                    format!("unsupported shim protocol {other:?}"),
                )
                .into());
            }
        };
        Ok(Self {
            version: version.max(2),
            address: address.to_owned(),
            protocol,
        })
    }

    /// The endpoint in one text, as clients hand it to `Tasks.Create`: `ttrpc+unix:///path`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let protocol = match self.protocol {
            Protocol::Ttrpc => "ttrpc",
            Protocol::Grpc => "grpc",
        };
        format!("{protocol}+{}", self.address)
    }

    /// As the file in the bundle.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and strings are JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_forms_are_read() {
        let message = BootstrapResult {
            version: 3,
            address: "unix:///a".to_owned(),
            protocol: "grpc".to_owned(),
            ..BootstrapResult::default()
        };
        let parsed = Bootstrap::parse(&message.encode_to_vec()).unwrap();
        assert_eq!((parsed.version, parsed.protocol), (3, Protocol::Grpc));
        let parsed =
            Bootstrap::parse(b"{\"version\":3,\"address\":\"unix:///b\",\"protocol\":\"ttrpc\"}\n")
                .unwrap();
        assert_eq!((parsed.version, parsed.address.as_str()), (3, "unix:///b"));
        let parsed = Bootstrap::parse(b"unix:///run/containerd/s/0a\n").unwrap();
        assert_eq!((parsed.version, parsed.protocol), (2, Protocol::Ttrpc));
    }

    #[test]
    fn a_newer_version_is_named_and_nonsense_is_refused() {
        let error = Bootstrap::parse(b"{\"version\":4,\"address\":\"x\"}").unwrap_err();
        assert_eq!(error.to_string(), "unsupported shim version (4)");
        for bad in [&b""[..], b"two words", &[0xff, 0xfe]] {
            assert!(Bootstrap::parse(bad).is_err());
        }
    }
}
