//! Namespace records; a namespace exists once anything was written in it.

use std::collections::BTreeMap;

use crate::{Error, Labels, Namespace};

/// Namespace records.
#[derive(Debug, Clone)]
pub struct Namespaces {}

impl Namespaces {
    /// Makes a namespace. Event `/namespaces/create`.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`.
    pub async fn create(&self, _name: &Namespace, _labels: Labels) -> Result<(), Error> {
        todo!()
    }
    /// Labels of a namespace; none for an unknown one.
    ///
    /// # Errors
    /// When the database fails.
    pub fn labels(&self, _name: &Namespace) -> Result<Labels, Error> {
        todo!()
    }
    /// All namespaces in byte order, with their labels.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self) -> Result<Vec<(Namespace, Labels)>, Error> {
        todo!()
    }
    /// Sets (`Some`) and removes (`None`) labels; `replace` clears the others first.
    /// Event `/namespaces/update`.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub async fn update(
        &self,
        _name: &Namespace,
        _labels: BTreeMap<String, Option<String>>,
        _replace: bool,
    ) -> Result<Labels, Error> {
        todo!()
    }
    /// Removes an empty namespace. Event `/namespaces/delete`.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` naming what is left in it.
    pub async fn delete(&self, _name: &Namespace) -> Result<(), Error> {
        todo!()
    }
}
