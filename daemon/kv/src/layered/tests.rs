//! Journal, overlay and store against a model, with crashes at any point.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::Key;
use crate::journal::tests::{CAPACITY, Fragile, dynamic};
use crate::memory::Memory;

type Model = BTreeMap<Key, Value>;
type Batch = Vec<(Key, Option<Value>)>;

/// A store that after a crash has what was synced and some of the batches since.
#[derive(Debug, Clone, Default)]
struct Store {
    state: Arc<Mutex<Inside>>,
    seen: Arc<Memory>,
}

#[derive(Debug, Clone, Default)]
struct Inside {
    durable: Model,
    since: Vec<Batch>,
}

fn change(model: &mut Model, batch: &Batch) {
    for (key, value) in batch {
        match value {
            Some(value) => model.insert(key.clone(), value.clone()),
            None => model.remove(key),
        };
    }
}

fn borrowed(batch: &Batch) -> Vec<Change<'_>> {
    let pairs = batch.iter();
    pairs.map(|(k, v)| (k.as_slice(), v.as_deref())).collect()
}

impl Store {
    fn holding(model: Model) -> Self {
        let store = Self::default();
        let batch: Batch = model
            .iter()
            .map(|(k, v)| (k.clone(), Some(v.clone())))
            .collect();
        store.seen.apply(&borrowed(&batch)).unwrap();
        store.state.lock().unwrap().durable = model;
        store
    }

    fn crashed(&self, kept: usize) -> Self {
        let Inside { mut durable, since } = self.state.lock().unwrap().clone();
        for batch in since.iter().take(kept % (since.len() + 1)) {
            change(&mut durable, batch);
        }
        Self::holding(durable)
    }
}

impl Backend for Store {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        self.seen.get(key)
    }

    fn visit(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
        seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        self.seen.visit(start, end, limit, seen)
    }

    fn apply(&self, batch: &[Change<'_>]) -> Result<(), Error> {
        let owned = batch
            .iter()
            .map(|(k, v)| (k.to_vec(), v.map(<[u8]>::to_vec)));
        self.state.lock().unwrap().since.push(owned.collect());
        self.seen.apply(batch)
    }

    fn sync(&self) -> Result<(), Error> {
        let state = &mut *self.state.lock().unwrap();
        for batch in state.since.drain(..) {
            change(&mut state.durable, &batch);
        }
        Ok(())
    }
}

fn open(store: &Store, media: &[Arc<Fragile>; 2]) -> Layered {
    let found = Found::of(media.each_ref().map(|medium| medium.cut(|| true)));
    assert_eq!(found.damage, None);
    replay(store, found.missing_below()).unwrap();
    let mut journal = Journal::resume(dynamic(media), CAPACITY, &found).unwrap();
    if found.missing_below().next().is_some() {
        note(&mut journal).unwrap();
    }
    Layered::over(Box::new(store.clone()), journal)
}

fn contents(backend: &dyn Backend) -> Model {
    let all = backend.range(b"", None, usize::MAX).unwrap();
    all.into_iter().collect()
}

#[derive(Debug, Clone)]
enum Step {
    Apply(Batch),
    Sync,
    Settle,
    /// After how many more writes and syncs of a segment, with how many bytes to commit, how much of
    /// the store's batches and which sectors of the journal survive.
    Crash(usize, usize, usize, Vec<bool>),
    Close,
    Read(Key, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let key = || proptest::collection::vec(b'a'..b'd', 1..3);
    let value = proptest::option::of((any::<u8>(), 0_usize..9000).prop_map(|(b, n)| vec![b; n]));
    prop_oneof![
        6 => proptest::collection::btree_map(key(), value, 1..4)
            .prop_map(|batch| Step::Apply(batch.into_iter().collect())),
        4 => Just(Step::Sync),
        1 => Just(Step::Settle),
        1 => (
            0_usize..7,
            0_usize..100_000,
            any::<usize>(),
            proptest::collection::vec(any::<bool>(), 16),
        )
            .prop_map(|(left, bytes, batches, sectors)| Step::Crash(left, bytes, batches, sectors)),
        1 => Just(Step::Close),
        3 => (key(), 0_usize..5).prop_map(|(key, limit)| Step::Read(key, limit)),
    ]
}

proptest! {
    #[test]
    fn what_was_synced_survives_any_crash_and_no_batch_by_half(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let (mut store, mut media) = (Store::default(), [Fragile::laid(), Fragile::laid()]);
        let mut layered = open(&store, &media);
        // States after each batch since the last sync, the synced one first.
        let mut states = vec![Model::new()];
        for step in steps {
            let newest = states.last().unwrap().clone();
            match step {
                Step::Apply(batch) => {
                    layered.apply(&borrowed(&batch)).unwrap();
                    let mut next = newest;
                    change(&mut next, &batch);
                    states.push(next);
                }
                Step::Sync => {
                    layered.sync().unwrap();
                    states = vec![newest];
                }
                Step::Settle => {
                    layered.settle().unwrap();
                    states = vec![newest];
                }
                Step::Read(key, limit) => {
                    prop_assert_eq!(layered.get(&key).unwrap(), newest.get(&key).cloned());
                    let wanted: Vec<_> = newest.range(key.clone()..).take(limit)
                        .map(|(k, v)| (k.clone(), v.clone())).collect();
                    prop_assert_eq!(layered.range(&key, None, limit).unwrap(), wanted);
                }
                Step::Crash(left, bytes, batches, sectors) => {
                    for medium in &media {
                        medium.fail_after(left);
                    }
                    let last: Batch = vec![(b"aa".to_vec(), Some(vec![9; bytes]))];
                    layered.apply(&borrowed(&last)).unwrap();
                    let mut next = newest;
                    change(&mut next, &last);
                    if layered.sync().is_ok() {
                        states = vec![next];
                    } else {
                        states.push(next);
                    }
                    let after = store.crashed(batches);
                    let mut sectors = sectors.into_iter().cycle();
                    media = media.each_ref()
                        .map(|medium| Fragile::holding(medium.cut(|| sectors.next().unwrap())));
                    store = after;
                    layered = open(&store, &media);
                    let left = contents(&layered);
                    prop_assert!(states.contains(&left), "{:?} is none of {:?}", left, states);
                    states = vec![left];
                }
                Step::Close => {
                    layered.close().unwrap();
                    prop_assert_eq!(&store.state.lock().unwrap().durable, &newest);
                    store = store.crashed(0);
                    layered = open(&store, &media);
                    states = vec![newest];
                }
            }
            prop_assert_eq!(&contents(&layered), states.last().unwrap());
        }
    }
}

#[test]
fn a_store_that_fails_stops_the_commits_that_need_it() {
    #[derive(Debug)]
    struct Broken(Memory);
    impl Backend for Broken {
        fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
            self.0.get(key)
        }
        fn visit(
            &self,
            start: &[u8],
            end: Option<&[u8]>,
            limit: usize,
            seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
        ) -> Result<(), Error> {
            self.0.visit(start, end, limit, seen)
        }
        fn apply(&self, _: &[Change<'_>]) -> Result<(), Error> {
            Err(Error::Full)
        }
        fn sync(&self) -> Result<(), Error> {
            Err(Error::Full)
        }
        fn free_bytes(&self) -> Option<u64> {
            Some(0)
        }
    }
    let media = [Fragile::laid(), Fragile::laid()];
    let journal = Journal::resume(dynamic(&media), CAPACITY, &Found::default()).unwrap();
    let layered = Layered::over(Box::new(Broken(Memory::default())), journal);
    let value = vec![1; 3000];
    let mut commits = 0;
    // A checkpoint that can wait leaves a full disk alone.
    layered.apply(&[(b"j", Some(&value))]).unwrap();
    layered.sync().unwrap();
    layered.settle().unwrap();
    assert!(layered.log().running.is_none() && layered.unsettled());
    commits += 1;
    let error = loop {
        layered.apply(&[(b"k", Some(&value))]).unwrap();
        match layered.sync() {
            Ok(()) => commits += 1,
            Err(error) => break error,
        }
        assert!(commits < 1000, "nobody noticed");
    };
    assert!(matches!(error, Error::Full), "{error}");
    assert!(commits >= 10, "the journal took {commits} commits");
    assert_eq!(layered.get(b"k").unwrap(), Some(value));
    // Everything acknowledged is in the journal.
    let found = Found::of(media.each_ref().map(|medium| medium.cut(|| false)));
    assert_eq!(found.after(0).count(), commits);
}

#[test]
fn a_checkpoint_that_stands_still_holds_up_neither_scans_nor_changes() {
    /// Takes the first of the changes that it is handed, and the others when it is told.
    #[derive(Debug)]
    struct Slow {
        pairs: Memory,
        begun: Mutex<std::sync::mpsc::Sender<()>>,
        go: Mutex<std::sync::mpsc::Receiver<()>>,
    }
    impl Backend for Slow {
        fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
            self.pairs.get(key)
        }
        fn visit(
            &self,
            start: &[u8],
            end: Option<&[u8]>,
            limit: usize,
            seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
        ) -> Result<(), Error> {
            self.pairs.visit(start, end, limit, seen)
        }
        fn apply(&self, batch: &[Change<'_>]) -> Result<(), Error> {
            self.pairs.apply(batch)
        }
        fn copy(&self, changes: &[Change<'_>]) -> Result<(), Error> {
            self.pairs.apply(&changes[..1])?;
            self.begun.lock().unwrap().send(()).unwrap();
            self.go.lock().unwrap().recv().unwrap();
            self.pairs.apply(&changes[1..])
        }
        fn sync(&self) -> Result<(), Error> {
            Ok(())
        }
    }
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (go, goes) = std::sync::mpsc::channel();
    let slow = Slow {
        pairs: Memory::default(),
        begun: Mutex::new(begun),
        go: Mutex::new(goes),
    };
    slow.pairs
        .apply(&[(b"a", Some(b"0")), (b"b", Some(b"0")), (b"c", Some(b"0"))])
        .unwrap();
    let media = [Fragile::laid(), Fragile::laid()];
    let journal = Journal::resume(dynamic(&media), CAPACITY, &Found::default()).unwrap();
    let layered = Layered::over(Box::new(slow), journal);
    let model = |pairs: &[(&str, &str)]| -> Model {
        let owned = pairs
            .iter()
            .map(|(k, v)| (k.as_bytes().into(), (*v).into()));
        owned.collect()
    };
    layered
        .apply(&[(b"a", Some(b"1")), (b"b", None), (b"d", Some(b"1"))])
        .unwrap();
    layered.sync().unwrap();
    layered.settle().unwrap();
    has_begun.recv().unwrap();

    let whole = model(&[("a", "1"), ("c", "0"), ("d", "1")]);
    assert_eq!(contents(&layered), whole);
    assert_eq!(layered.get(b"b").unwrap(), None);
    layered.apply(&[(b"b", Some(b"2"))]).unwrap();
    layered.sync().unwrap();
    let newer = model(&[("a", "1"), ("b", "2"), ("c", "0"), ("d", "1")]);
    assert_eq!(contents(&layered), newer);

    go.send(()).unwrap();
    layered.log().finish_checkpoint().unwrap();
    assert_eq!(contents(&layered), newer);
    // Closing copies the rest, in one more part.
    go.send(()).unwrap();
    layered.close().unwrap();
    assert_eq!(contents(&layered), newer);
}

#[test]
fn what_can_wait_does_while_a_commit_waits_for_the_disk() {
    let media = [Fragile::laid(), Fragile::laid()];
    let layered = open(&Store::holding(Model::new()), &media);
    layered.apply(&[(b"a", Some(b"1"))]).unwrap();
    assert!(!layered.is_crowded());
    std::thread::scope(|scope| {
        let still = media.each_ref().map(|medium| medium.stand_still());
        scope.spawn(|| layered.sync().unwrap());
        let began = Instant::now();
        while !layered.is_crowded() {
            assert!(began.elapsed() < Duration::from_secs(30), "never told");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(still);
    });
    assert!(!layered.is_crowded());
}
