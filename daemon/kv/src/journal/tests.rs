//! The journal against disks that fail: torn writes, lost writes, bytes that rot.

use std::sync::Mutex;

use proptest::prelude::*;

use super::segment::{Scan, frame_bytes, scan};
use super::*;

const BYTES: usize = 64 << 10;
pub(crate) const CAPACITY: u64 = BYTES as u64;
const SECTOR: usize = 512;

/// Bytes that a power cut leaves half of.
#[derive(Debug, Default)]
pub(crate) struct Fragile {
    state: Mutex<State>,
}

#[derive(Debug, Default, Clone)]
struct State {
    durable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    /// Writes and syncs that still work; all of them without.
    left: Option<usize>,
}

impl State {
    fn step(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(io::Error::other("the disk is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, part: &[u8]) {
    let end = offset + part.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(part);
}

impl Fragile {
    pub(crate) fn laid() -> Arc<Self> {
        let state = State {
            durable: vec![0; BYTES],
            unsynced: Vec::new(),
            left: None,
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    pub(crate) fn holding(durable: Vec<u8>) -> Arc<Self> {
        let fragile = Self::laid();
        fragile.state.lock().unwrap().durable = durable;
        fragile
    }

    /// No write and no sync ends while what it returns is held.
    pub(crate) fn stand_still(&self) -> impl Drop {
        self.state.lock().unwrap()
    }

    /// Lets this many more writes and syncs work.
    pub(crate) fn fail_after(&self, steps: usize) {
        self.state.lock().unwrap().left = Some(steps);
    }

    /// What is there after a power cut that let through the sectors that `kept` chooses.
    pub(crate) fn cut(&self, mut kept: impl FnMut() -> bool) -> Vec<u8> {
        let State {
            mut durable,
            unsynced,
            ..
        } = self.state.lock().unwrap().clone();
        for (offset, bytes) in unsynced {
            for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                if kept() {
                    put(&mut durable, offset + n * SECTOR, sector);
                }
            }
        }
        durable
    }
}

impl Medium for Fragile {
    fn read(&self) -> io::Result<Vec<u8>> {
        Ok(self.cut(|| true))
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.state.lock().unwrap();
        let offset = usize::try_from(offset).unwrap();
        // One that fails may have got through in parts.
        state.unsynced.push((offset, bytes.to_vec()));
        state.step()
    }

    fn sync(&self) -> io::Result<()> {
        let state = &mut *self.state.lock().unwrap();
        state.step()?;
        for (offset, bytes) in state.unsynced.drain(..) {
            put(&mut state.durable, offset, &bytes);
        }
        Ok(())
    }

    fn cut(&self, length: u64) -> io::Result<()> {
        let durable = &mut self.state.lock().unwrap().durable;
        durable.truncate(usize::try_from(length).unwrap());
        Ok(())
    }
}

fn frame(n: u64, bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; FRAME_HEAD];
    push(&mut frame, &n.to_be_bytes(), Some(&vec![7; bytes])).unwrap();
    frame
}

fn fresh(media: &[Arc<Fragile>; 2]) -> Journal {
    Journal::resume(dynamic(media), CAPACITY, &Found::default()).unwrap()
}

pub(crate) fn dynamic(media: &[Arc<Fragile>; 2]) -> [Arc<dyn Medium>; SEGMENTS] {
    [media[0].clone(), media[1].clone()]
}

fn numbers(found: &Found) -> Vec<u64> {
    let numbers = found.after(0).flat_map(|payload| {
        let changes = changes(payload).unwrap();
        let keys = changes
            .into_iter()
            .map(|(key, _)| u64::from_be_bytes(key.try_into().unwrap()));
        keys.collect::<Vec<_>>()
    });
    numbers.collect()
}

#[test]
fn commits_come_back_in_order_over_both_segments() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    for n in 1..=20 {
        let mut frame = frame(n, 5000);
        if !journal.fits(frame.len() - FRAME_HEAD) {
            journal.begin(n - 1).unwrap();
        }
        journal.append(&mut frame, 0).unwrap();
    }
    let found = Found::of([media[0].cut(|| false), media[1].cut(|| false)]);
    assert_eq!(found.damage, None);
    // The third generation took the place of the first.
    let expected = found.oldest().unwrap();
    assert_eq!(numbers(&found), (expected..=20).collect::<Vec<_>>());
    assert_eq!(found.newest(), 20);
}

#[test]
fn a_commit_larger_than_a_segment_comes_back() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    journal.append(&mut frame(1, 10), 0).unwrap();
    let mut large = frame(2, 3 * BYTES);
    assert!(!journal.fits(large.len()));
    journal.begin(journal.sequence()).unwrap();
    journal.append(&mut large, 0).unwrap();
    assert!(!journal.fits(0));
    let found = Found::of([media[0].cut(|| false), media[1].cut(|| false)]);
    assert_eq!((found.damage.clone(), numbers(&found)), (None, vec![1, 2]));
    let mut journal = Journal::resume(dynamic(&media), CAPACITY, &found).unwrap();
    journal.begin(journal.sequence()).unwrap();
    journal.begin(journal.sequence()).unwrap();
    assert_eq!(
        media[1].cut(|| false).len() as u64,
        CAPACITY,
        "cut off again"
    );
}

#[test]
fn a_last_commit_torn_at_any_byte_is_no_damage() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    journal.append(&mut frame(1, 5000), 0).unwrap();
    let before = media[1].cut(|| false);
    journal.append(&mut frame(2, 5000), 0).unwrap();
    let after = media[1].cut(|| false);
    let end = after.len() - after.iter().rev().take_while(|b| **b == 0).count();
    for torn in FRAMES..end {
        let mut bytes = after.clone();
        bytes[torn..].copy_from_slice(&before[torn..]);
        let found = Found::of([media[0].cut(|| false), bytes]);
        assert_eq!(found.damage, None, "torn at {torn}");
        let first_is_whole = torn >= FRAMES + FRAME_HEAD + 16 + 5000;
        if first_is_whole {
            assert_eq!(numbers(&found), [1], "torn at {torn}");
        }
    }
}

#[test]
fn damage_in_the_middle_is_told_and_the_rest_comes_back() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    for n in 1..=5 {
        journal.append(&mut frame(n, 100), 0).unwrap();
    }
    let whole = media[1].cut(|| false);
    for (broken, reason) in [(0, "commits 1 to 1"), (2, "commits 3 to 3")] {
        let mut bytes = whole.clone();
        bytes[FRAMES + broken * BLOCK + 50] ^= 1;
        let found = Found::of([media[0].cut(|| false), bytes]);
        let damage = found.damage.clone().unwrap();
        assert!(damage.reason.contains(reason), "{}", damage.reason);
        assert_eq!(damage.segments, [1]);
        assert_eq!(numbers(&found).len(), 4);
    }
    let mut bytes = whole.clone();
    bytes[10] ^= 1;
    assert_eq!(
        Found::of([vec![0; 9000], bytes.clone()]).damage,
        None,
        "one header is enough"
    );
    bytes[BLOCK + 10] ^= 1;
    let found = Found::of([media[0].cut(|| false), bytes]);
    assert!(found.damage.unwrap().reason.contains("header"));
    let found = Found::of([Vec::new(), whole]);
    assert!(found.damage.unwrap().reason.contains("not there"));
}

#[test]
fn damage_of_what_is_below_already_matters_to_nobody() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    journal.append(&mut frame(1, 100), 0).unwrap();
    journal.append(&mut frame(2, 100), 0).unwrap();
    journal.append(&mut frame(3, 100), 2).unwrap();
    let mut bytes = media[1].cut(|| false);
    bytes[FRAMES + 50] ^= 1;
    let found = Found::of([media[0].cut(|| false), bytes]);
    assert_eq!(found.damage, None);
    assert_eq!(found.missing_below().count(), 1);
}

#[test]
fn what_an_older_generation_left_is_not_taken_for_new() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    for n in 1..=5 {
        journal.append(&mut frame(n, 100), 0).unwrap();
    }
    journal.begin(journal.sequence()).unwrap();
    journal.append(&mut frame(6, 100), 5).unwrap();
    journal.begin(journal.sequence()).unwrap();
    let Scan::Used { header, frames } = scan(&media[1].cut(|| false)) else {
        panic!("not in use");
    };
    assert_eq!((header.generation, frames.len()), (3, 0));
    assert_eq!(frame_bytes(0), BLOCK);
}

#[test]
fn a_segment_whose_begin_was_cut_short_is_no_damage() {
    let media = [Fragile::laid(), Fragile::laid()];
    let mut journal = fresh(&media);
    journal.append(&mut frame(1, 100), 0).unwrap();
    journal.begin(journal.sequence()).unwrap();
    journal.append(&mut frame(2, 100), 1).unwrap();
    let old = media[1].cut(|| false);
    journal.begin(journal.sequence()).unwrap();
    let new = media[1].cut(|| false);
    // The first header is torn while the second is old, or the second while the first is new.
    for (block, from, to) in [(0, &old, &new), (1, &new, &old)] {
        for torn in 0..64 {
            let mut bytes = from.clone();
            let at = block * BLOCK;
            if block == 0 {
                bytes[at..at + torn].copy_from_slice(&to[at..at + torn]);
            } else {
                bytes[at + torn..at + BLOCK].copy_from_slice(&to[at + torn..at + BLOCK]);
            }
            let found = Found::of([media[0].cut(|| false), bytes]);
            assert_eq!(found.damage, None, "block {block} torn at {torn}");
            assert_eq!(found.newest(), 2);
        }
    }
}

proptest! {
    #[test]
    fn a_power_cut_takes_only_what_was_not_synced(
        sizes in proptest::collection::vec(0_usize..20_000, 1..12),
        sectors in proptest::collection::vec(any::<bool>(), 64),
    ) {
        let media = [Fragile::laid(), Fragile::laid()];
        let mut journal = fresh(&media);
        let last = sizes.len() as u64;
        let mut checkpoint = 0;
        for (n, size) in (1..).zip(sizes) {
            let mut frame = frame(n, size);
            if !journal.fits(frame.len() - FRAME_HEAD) {
                journal.begin(checkpoint).unwrap();
                // What the next one to be begun is to make room for.
                checkpoint = n - 1;
            }
            if n < last {
                journal.append(&mut frame, 0).unwrap();
            } else {
                // The cut comes between write and sync of the last one.
                seal(&mut frame, journal.header, journal.sequence + 1, 0);
                journal.medium().write(journal.offset, &frame).unwrap();
            }
        }
        let mut sectors = sectors.into_iter().cycle();
        let bytes = media.each_ref().map(|medium| medium.cut(|| sectors.next().unwrap()));
        let found = Found::of(bytes.clone());
        prop_assert_eq!(&found.damage, &None);
        let newest = found.newest();
        prop_assert!(newest == last || newest == last - 1, "{} of {}", newest, last);
        // Whatever the cut left is overwritten without being read.
        let media = bytes.map(Fragile::holding);
        let mut journal = Journal::resume(dynamic(&media), CAPACITY, &found).unwrap();
        journal.append(&mut frame(newest + 1, 10), newest).unwrap();
        let again = Found::of([media[0].cut(|| false), media[1].cut(|| false)]);
        prop_assert_eq!(&again.damage, &None);
        prop_assert_eq!(again.newest(), newest + 1);
        prop_assert_eq!(again.missing_below().count(), 1);
    }
}
