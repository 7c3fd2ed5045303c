//! CRI messages as JSON, the way Go writes them: field names of the protobuf files.
//!
//! Records of pods and containers hold their configs like this, so that a node can move between
//! containerd and lighter, and `crictl inspect` shows them.

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, SerializeOptions};
use serde_json::Value;

use crate::error::{Error, Result};

/// The descriptors that JSON is written and read by.
#[derive(Debug, Clone)]
pub struct Json {
    pool: DescriptorPool,
}

impl Json {
    /// Reads our own descriptors.
    ///
    /// # Errors
    /// Never, unless the build is broken.
    pub fn new() -> Result<Self> {
        let pool = DescriptorPool::decode(lighter_proto::CRI_DESCRIPTOR_SET)
            .map_err(|e| Error::unknown(format!("own descriptors: {e}")))?;
        Ok(Self { pool })
    }

    /// A message as JSON.
    ///
    /// # Errors
    /// For a message that is not of our descriptors.
    pub fn write<M: Message + Name>(&self, message: &M) -> Result<Value> {
        let name = M::full_name();
        let descriptor = self
            .pool
            .get_message_by_name(&name)
            .ok_or_else(|| Error::unknown(format!("{name} has no descriptor")))?;
        let mut dynamic = DynamicMessage::new(descriptor);
        let bytes = message.encode_to_vec();
        dynamic
            .merge(bytes.as_slice())
            .map_err(|e| Error::unknown(format!("{name}: {e}")))?;
        let options = SerializeOptions::new()
            .use_proto_field_name(true)
            .use_enum_numbers(true)
            .stringify_64_bit_integers(false);
        Ok(dynamic.serialize_with_options(serde_json::value::Serializer, &options)?)
    }

    /// A message from JSON; fields of newer versions are passed over.
    ///
    /// # Errors
    /// For JSON of another shape.
    pub fn read<M: Message + Name + Default>(&self, value: &Value) -> Result<M> {
        let name = M::full_name();
        let descriptor = self
            .pool
            .get_message_by_name(&name)
            .ok_or_else(|| Error::unknown(format!("{name} has no descriptor")))?;
        let options = DeserializeOptions::new().deny_unknown_fields(false);
        let dynamic =
            DynamicMessage::deserialize_with_options(descriptor, value.clone(), &options)?;
        M::decode(dynamic.encode_to_vec().as_slice())
            .map_err(|e| Error::unknown(format!("{name}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_proto::runtime::v1::{PodSandboxConfig, PodSandboxMetadata, PortMapping};

    #[test]
    fn a_config_reads_back() {
        let json = Json::new().unwrap();
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "p".into(),
                attempt: 3,
                ..Default::default()
            }),
            port_mappings: vec![PortMapping {
                host_port: 80,
                protocol: 1,
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = json.write(&config).unwrap();
        assert_eq!(value["port_mappings"][0]["host_port"], 80);
        assert_eq!(value["port_mappings"][0]["protocol"], 1);
        assert_eq!(json.read::<PodSandboxConfig>(&value).unwrap(), config);
    }
}
