//! The key space in memory: the model that the tests hold the real one against.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{PoisonError, RwLock};

use crate::{Backend, Change, Error, Key, Value};

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pairs: RwLock<BTreeMap<Key, Value>>,
}

impl Backend for Memory {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        Ok(self
            .pairs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned())
    }

    fn visit(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
        seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        let upper = end.map_or(Bound::Unbounded, Bound::Excluded);
        if end.is_some_and(|end| start >= end) {
            return Ok(());
        }
        let pairs = self.pairs.read().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in pairs
            .range::<[u8], _>((Bound::Included(start), upper))
            .take(limit)
        {
            if !seen(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: &[Change<'_>]) -> Result<(), Error> {
        let mut pairs = self.pairs.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in batch {
            match value {
                Some(value) => pairs.insert(key.to_vec(), value.to_vec()),
                None => pairs.remove(*key),
            };
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        Ok(())
    }
}
