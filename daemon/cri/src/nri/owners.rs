//! Which plugin set which field of which container: the basis of conflict detection.

use std::collections::HashMap;

use lighter_proto::nri::pkg::api::v1alpha1::{
    CompoundFieldOwners, Field, FieldOwners, OwningPlugins,
};

use super::error::Error;

/// Owners of everything set so far in one request.
#[derive(Debug, Clone, Default)]
pub(super) struct Owners {
    containers: HashMap<String, FieldOwners>,
}

impl Owners {
    /// The form that validators get.
    pub(super) fn message(&self) -> OwningPlugins {
        OwningPlugins {
            owners: self.containers.clone(),
        }
    }

    /// Claims a field that has one value.
    pub(super) fn claim(&mut self, id: &str, field: Field, plugin: &str) -> Result<(), Error> {
        let owners = self.containers.entry(id.to_owned()).or_default();
        let number = i32::from(field);
        let owner = owners
            .simple
            .entry(number)
            .or_insert_with(|| plugin.to_owned());
        same(owner, plugin, field, "")
    }

    /// Claims one entry of a field that has several.
    pub(super) fn claim_entry(
        &mut self,
        id: &str,
        field: Field,
        key: &str,
        plugin: &str,
    ) -> Result<(), Error> {
        let owners = self.containers.entry(id.to_owned()).or_default();
        let entries = owners.compound.entry(i32::from(field)).or_default();
        let CompoundFieldOwners { owners } = entries;
        let owner = owners
            .entry(key.to_owned())
            .or_insert_with(|| plugin.to_owned());
        same(owner, plugin, field, key)
    }

    /// Adds an owner to a field that all plugins share.
    pub(super) fn share(&mut self, id: &str, field: Field, plugin: &str) {
        let owners = self.containers.entry(id.to_owned()).or_default();
        let owner = owners.simple.entry(i32::from(field)).or_default();
        if !owner.is_empty() {
            owner.push(',');
        }
        owner.push_str(plugin);
    }

    /// Frees a field, for the next plugin to set.
    pub(super) fn release(&mut self, id: &str, field: Field) {
        if let Some(owners) = self.containers.get_mut(id) {
            owners.simple.remove(&i32::from(field));
        }
    }

    /// Frees one entry of a field.
    pub(super) fn release_entry(&mut self, id: &str, field: Field, key: &str) {
        let owners = self.containers.get_mut(id);
        if let Some(entries) = owners.and_then(|o| o.compound.get_mut(&i32::from(field))) {
            entries.owners.remove(key);
        }
    }

    /// The owner of a field that has one value, or shared ones.
    pub(super) fn owner(&self, id: &str, field: Field) -> Option<&str> {
        let owners = self.containers.get(id)?;
        owners.simple.get(&i32::from(field)).map(String::as_str)
    }

    /// The owners of a field's entries.
    pub(super) fn entry_owners(&self, id: &str, field: Field) -> Vec<&str> {
        let entries = self
            .containers
            .get(id)
            .and_then(|owners| owners.compound.get(&i32::from(field)));
        let owners = entries.map(|entries| entries.owners.values());
        owners.into_iter().flatten().map(String::as_str).collect()
    }
}

fn same(owner: &str, plugin: &str, field: Field, key: &str) -> Result<(), Error> {
    if owner == plugin {
        return Ok(());
    }
    let field = format!("{} {key}", field.as_str_name());
    Err(Error::Conflict {
        plugin: plugin.to_owned(),
        other: owner.to_owned(),
        field: field.trim_end().to_owned(),
    })
}
