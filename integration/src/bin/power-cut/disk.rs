//! A disk with a volatile write cache, served over NBD on a Unix socket: writes stay in memory until they are flushed,
//! and a power cut loses a random part of those that were not, as real disks may write them in any order.
//!
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, fixed newstyle, simple replies. FUA is not
//! offered, so that the client flushes instead.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use lighter_integration::Result;
use rand::Rng as _;

/// Largest request: qemu's are up to 32 MiB.
const MAX_REQUEST: u32 = 64 << 20;
/// Smallest unit that a disk writes whole.
const SECTOR: usize = 512;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const ANSWER_MAGIC: u32 = 0x6744_6698;
/// Flags of the export: there are flags, and it can be flushed.
const EXPORT_FLAGS: u16 = 0b101;

/// The disk.
#[derive(Debug, Clone)]
pub(crate) struct Disk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// What a cut leaves.
    durable: File,
    size: u64,
    /// Writes since the last flush, in order.
    cache: Vec<(u64, Vec<u8>)>,
    flushes: u64,
    /// The power is off: nothing is taken any more.
    off: bool,
}

/// What a cut did.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    pub(crate) flushes: u64,
    pub(crate) unflushed: usize,
    pub(crate) lost: usize,
}

impl Disk {
    pub(crate) fn new(durable: File) -> Result<Self> {
        let size = durable.metadata()?.len();
        Ok(Self(Arc::new(Mutex::new(State {
            durable,
            size,
            cache: Vec::new(),
            flushes: 0,
            off: false,
        }))))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power: some unflushed writes have reached the medium, some in part, the others are lost.
    pub(crate) fn cut(&self) -> Result<Cut> {
        let mut state = self.state();
        state.off = true;
        let mut random = rand::rng();
        // From losing all to losing hardly anything.
        let kept: f64 = random.random();
        let cache = std::mem::take(&mut state.cache);
        let mut cut = Cut {
            flushes: state.flushes,
            unflushed: cache.len(),
            lost: 0,
        };
        for (offset, data) in cache {
            if !random.random_bool(kept) {
                cut.lost += 1;
                continue;
            }
            let sectors = data.len() / SECTOR;
            let torn = sectors > 1 && random.random_bool(0.1);
            let end = if torn {
                random.random_range(1..sectors) * SECTOR
            } else {
                data.len()
            };
            state.durable.write_all_at(&data[..end], offset)?;
        }
        Ok(cut)
    }

    /// Serves one client until it goes.
    pub(crate) fn serve(&self, mut client: UnixStream) -> Result<()> {
        let size = self.state().size;
        if !negotiate(&mut client, size)? {
            return Ok(());
        }
        while self.answer(&mut client)? {}
        Ok(())
    }

    /// One request; `false` when there are no more.
    fn answer(&self, client: &mut UnixStream) -> Result<bool> {
        let mut header = [0; 28];
        if client.read_exact(&mut header).is_err() {
            return Ok(false);
        }
        let u32_at =
            |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let offset = u64::from_be_bytes(header[16..24].try_into().expect("8 bytes"));
        let (kind, length) = (u16::from_be_bytes([header[6], header[7]]), u32_at(24));
        anyhow::ensure!(u32_at(0) == REQUEST_MAGIC, "not a request");
        anyhow::ensure!(length <= MAX_REQUEST, "a request of {length} bytes");
        let mut data = vec![0; if kind < 2 { length as usize } else { 0 }];
        if kind == 1 {
            client.read_exact(&mut data)?;
        }
        let mut state = self.state();
        if state.off {
            return Ok(false);
        }
        match kind {
            0 => state.read(offset, &mut data)?,
            1 => state.cache.push((offset, std::mem::take(&mut data))),
            2 => return Ok(false),
            3 => state.flush()?,
            _ => {}
        }
        drop(state);
        let error: u32 = if kind > 3 { 22 } else { 0 };
        let mut answer = Vec::with_capacity(16 + data.len());
        answer.extend(ANSWER_MAGIC.to_be_bytes());
        answer.extend(error.to_be_bytes());
        answer.extend(&header[8..16]);
        answer.extend(data);
        client.write_all(&answer)?;
        Ok(true)
    }
}

impl State {
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.durable.read_exact_at(into, offset)?;
        let end = offset + into.len() as u64;
        for (at, data) in &self.cache {
            let (from, to) = ((*at).max(offset), (*at + data.len() as u64).min(end));
            if from < to {
                let part = |start: u64| usize::try_from(from - start)..;
                let length = usize::try_from(to - from)?;
                let source = &data[part(*at).start?..][..length];
                into[part(offset).start?..][..length].copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        for (offset, data) in std::mem::take(&mut self.cache) {
            self.durable.write_all_at(&data, offset)?;
        }
        self.flushes += 1;
        Ok(())
    }
}

/// Agrees on the one export; `false` when the client only looked.
fn negotiate(client: &mut UnixStream, size: u64) -> Result<bool> {
    client.write_all(b"NBDMAGICIHAVEOPT")?;
    // Fixed newstyle, no zeroes after the export's size.
    client.write_all(&3_u16.to_be_bytes())?;
    let mut flags = [0; 4];
    client.read_exact(&mut flags)?;
    loop {
        let mut header = [0; 16];
        client.read_exact(&mut header)?;
        let option = u32::from_be_bytes(header[8..12].try_into()?);
        let length = u32::from_be_bytes(header[12..16].try_into()?);
        anyhow::ensure!(
            u64::from_be_bytes(header[..8].try_into()?) == OPTION_MAGIC && length < 65536,
            "not an option"
        );
        let mut data = vec![0; length as usize];
        client.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| -> Result<()> {
            let mut bytes = Vec::new();
            bytes.extend(REPLY_MAGIC.to_be_bytes());
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len())?.to_be_bytes());
            bytes.extend(data);
            client.write_all(&bytes).context("reply to an option")
        };
        let export = [&size.to_be_bytes()[..], &EXPORT_FLAGS.to_be_bytes()].concat();
        match option {
            // The export by name: straight to the requests.
            1 => {
                client.write_all(&export)?;
                return Ok(true);
            }
            2 => {
                reply(1, &[])?;
                return Ok(false);
            }
            // Info and go.
            6 | 7 => {
                reply(3, &[&0_u16.to_be_bytes()[..], &export].concat())?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(true);
                }
            }
            _ => reply(0x8000_0001, &[])?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_see_the_cache_and_cuts_lose_only_what_was_not_flushed() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let disk = Disk::new(file.try_clone().unwrap()).unwrap();
        let mut state = disk.state();
        state.cache.push((0, vec![1; 512]));
        state.flush().unwrap();
        state.cache.push((256, vec![2; 512]));
        let mut seen = vec![0; 1024];
        state.read(0, &mut seen).unwrap();
        assert_eq!((seen[255], seen[256], seen[767], seen[768]), (1, 2, 2, 0));
        drop(state);
        disk.cut().unwrap();
        let mut left = [0];
        file.read_exact_at(&mut left, 100).unwrap();
        assert_eq!(left, [1], "flushed before the cut");
    }
}
