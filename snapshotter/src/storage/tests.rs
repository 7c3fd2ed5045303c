//! The records against a model, and what a reopen finds.

use std::collections::BTreeMap;

use lighter_kv::Db;
use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Create {
        key: u8,
        parent: Option<u8>,
        kind: Kind,
    },
    Commit {
        name: u8,
        key: u8,
        parent: Option<u8>,
    },
    Remove {
        key: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0..6_u8;
    let kind = prop_oneof![Just(Kind::Active), Just(Kind::View)];
    let step = prop_oneof![
        (name.clone(), proptest::option::of(name.clone()), kind)
            .prop_map(|(key, parent, kind)| Step::Create { key, parent, kind }),
        (
            name.clone(),
            name.clone(),
            proptest::option::of(name.clone())
        )
            .prop_map(|(name, key, parent)| Step::Commit { name, key, parent }),
        name.prop_map(|key| Step::Remove { key }),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Kind, parent and id by name.
type Model = BTreeMap<String, (Kind, Option<String>, u64)>;

fn model_chain(model: &Model, parent: Option<&String>) -> Vec<u64> {
    let mut chain = Vec::new();
    let mut next = parent;
    while let Some(name) = next {
        let (_, parent, id) = &model[name];
        chain.push(*id);
        next = parent.as_ref();
    }
    chain
}

fn step_model(model: &mut Model, step: &Step, id: u64) -> bool {
    let committed = |model: &Model, name: &str| {
        model
            .get(name)
            .is_some_and(|(kind, ..)| *kind == Kind::Committed)
    };
    match step {
        Step::Create { key, parent, kind } => {
            let parent = parent.map(|p| p.to_string());
            let fine = !model.contains_key(&key.to_string())
                && parent.as_ref().is_none_or(|p| committed(model, p));
            if fine {
                model.insert(key.to_string(), (*kind, parent, id));
            }
            fine
        }
        Step::Commit { name, key, parent } => {
            let Some((Kind::Active, old, id)) = model.get(&key.to_string()).cloned() else {
                return false;
            };
            if model.contains_key(&name.to_string()) {
                return false;
            }
            let mut parent = parent.map(|p| p.to_string());
            if parent.is_some()
                && parent != old
                && (old.is_some() || !committed(model, parent.as_ref().unwrap()))
            {
                return false;
            }
            parent = parent.or(old);
            model.remove(&key.to_string());
            model.insert(name.to_string(), (Kind::Committed, parent, id));
            true
        }
        Step::Remove { key } => {
            let key = key.to_string();
            let fine = model.contains_key(&key)
                && model
                    .values()
                    .all(|(_, parent, _)| parent.as_ref() != Some(&key));
            if fine {
                model.remove(&key);
            }
            fine
        }
    }
}

fn step_records(records: &Records, step: &Step, id: u64) -> bool {
    match step {
        Step::Create { key, parent, kind } => {
            let draft = Draft {
                key: key.to_string(),
                kind: *kind,
                parent: parent.map(|p| p.to_string()),
                labels: Labels::new(),
            };
            records
                .plan(&draft, id)
                .and_then(|planned| records.insert(&draft, &planned))
                .map(drop)
                .is_ok()
        }
        Step::Commit { name, key, parent } => {
            let options = CommitOptions {
                labels: Labels::new(),
                parent: parent.map(|p| p.to_string()),
                ..CommitOptions::default()
            };
            records
                .commit(
                    &name.to_string(),
                    &key.to_string(),
                    &options,
                    Usage::default(),
                )
                .map(drop)
                .is_ok()
        }
        Step::Remove { key } => records.remove(&key.to_string()).map(drop).is_ok(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn records_behave_like_the_model(steps in steps()) {
        let db = Db::in_memory().unwrap();
        let records = Records::open(db.clone(), b"s/test/").unwrap();
        let mut model = Model::new();
        for (id, step) in steps.iter().enumerate() {
            let id = id as u64;
            prop_assert_eq!(step_records(&records, step, id), step_model(&mut model, step, id), "{:?}", step);
        }
        let again = Records::open(db, b"s/test/").unwrap();
        let found: Vec<_> = again.all().unwrap();
        prop_assert_eq!(found.len(), model.len());
        for record in found {
            let (kind, parent, id) = &model[&record.info.name];
            prop_assert_eq!(record.info.kind, *kind);
            prop_assert_eq!(record.info.parent.as_ref(), parent.as_ref());
            prop_assert_eq!(record.id, *id);
            prop_assert_eq!(record.parent_ids, model_chain(&model, parent.as_ref()));
        }
    }
}

#[test]
fn prefixes_do_not_mix() {
    let db = Db::in_memory().unwrap();
    let one = Records::open(db.clone(), b"s/one/").unwrap();
    let two = Records::open(db, b"s/two/").unwrap();
    let step = Step::Create {
        key: 1,
        parent: None,
        kind: Kind::Active,
    };
    assert!(step_records(&one, &step, 1));
    assert!(two.all().unwrap().is_empty());
    assert!(step_records(&two, &step, 1));
}

#[test]
fn another_schema_version_is_refused() {
    let db = Db::in_memory().unwrap();
    let (_, ticket) = db
        .update(|tx| {
            tx.put(b"s/x/v".to_vec(), 2_u32.to_be_bytes());
            Ok::<_, Error>(())
        })
        .unwrap();
    drop(ticket);
    assert!(matches!(
        Records::open(db, b"s/x/"),
        Err(Error::Damaged { .. })
    ));
}
