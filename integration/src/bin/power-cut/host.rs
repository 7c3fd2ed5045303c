//! Outside the machine: boots, listens, cuts, boots again.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lighter_integration::Result;
use rand::Rng as _;

use crate::disk::Disk;
use crate::fact::{Fact, Known};

/// Size of the data disk.
const DISK_BYTES: u64 = 512 << 20;
/// How long a boot with its comparison may take: emulated, on a machine that does other things as well.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);
/// How much the machine gets acknowledged before its power is cut, how long it may take for that, and how much later the
/// cut comes, at most.
const WORK_FACTS: std::ops::Range<usize> = 5..80;
const WORK_TIMEOUT: Duration = Duration::from_secs(60);
const DELAY_MS: std::ops::Range<u64> = 0..400;

struct Machine {
    child: Child,
    facts: Receiver<Fact>,
    disk: Disk,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `ROUNDS DIRECTORY -- COMMAND…`: the command starts the machine; it gets the data disk's socket as `nbd+unix:///?socket=…`
/// in `DATA`, the list of what is known in the file `KNOWN`, and its second serial line on its standard output.
pub(crate) fn run(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let rounds: u32 = arguments.next().context("ROUNDS")?.parse()?;
    let dir = PathBuf::from(arguments.next().context("DIRECTORY")?);
    let command: Vec<String> = arguments.skip_while(|word| word == "--").collect();
    let medium = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join("data.img"))?;
    medium.set_len(DISK_BYTES)?;
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-F"])
        .arg(dir.join("data.img"))
        .status()?;
    anyhow::ensure!(made.success(), "mke2fs failed");
    let mut known = Known::default();
    for round in 0..=rounds {
        let machine = boot(&dir, &command, &medium, &known)?;
        let compared = listen(&machine, &mut known, usize::MAX, BOOT_TIMEOUT)?;
        let Some(compared) = compared else {
            anyhow::bail!("round {round}: the machine did not come up");
        };
        if round == rounds {
            writeln!(
                std::io::stdout(),
                "round {round}: {compared} things compared, all right"
            )?;
            break;
        }
        let mut random = rand::rng();
        let facts = random.random_range(WORK_FACTS);
        let delay = Duration::from_millis(random.random_range(DELAY_MS));
        let before = known.there.len();
        listen(&machine, &mut known, facts, WORK_TIMEOUT)?;
        listen(&machine, &mut known, usize::MAX, delay)?;
        let cut = machine.disk.cut()?;
        drop(machine);
        writeln!(
            std::io::stdout(),
            "round {round}: {compared} compared, all right; {} more acknowledged, then cut after {} flushes: {} of {} unflushed writes lost",
            known.there.len().saturating_sub(before),
            cut.flushes,
            cut.lost,
            cut.unflushed
        )?;
    }
    Ok(())
}

fn boot(dir: &Path, command: &[String], medium: &File, known: &Known) -> Result<Machine> {
    let disk = Disk::new(medium.try_clone()?)?;
    let socket = dir.join("nbd.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)?;
    let served = disk.clone();
    // Ends with the machine, whose connections close.
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let disk = served.clone();
            std::thread::spawn(move || {
                if let Err(error) = disk.serve(client) {
                    eprintln!("disk: {error:#}");
                }
            });
        }
    });
    let path = dir.join("known.img");
    let mut text = known.lines().into_bytes();
    // A disk is whole sectors.
    text.resize((text.len() / 512 + 1) * 512, 0);
    File::create(&path)?.write_all(&text)?;
    let (program, words) = command.split_first().context("COMMAND")?;
    let mut child = Command::new(program)
        .args(words)
        .env("DATA", format!("nbd+unix:///?socket={}", socket.display()))
        .env("KNOWN", &path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let serial = child.stdout.take().context("stdout is piped")?;
    let (sender, facts) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(serial)
            .split(b'\n')
            .map_while(std::io::Result::ok)
        {
            if let Some(fact) = Fact::read(&String::from_utf8_lossy(&line))
                && sender.send(fact).is_err()
            {
                break;
            }
        }
    });
    Ok(Machine { child, facts, disk })
}

/// Takes in what the guest says: until it has compared, has said so many facts, or the time is over. Returns how much was
/// compared.
fn listen(
    machine: &Machine,
    known: &mut Known,
    facts: usize,
    time: Duration,
) -> Result<Option<usize>> {
    let end = Instant::now() + time;
    for _ in 0..facts {
        let left = end.saturating_duration_since(Instant::now());
        match machine.facts.recv_timeout(left) {
            Ok(Fact::Compared(count)) => return Ok(Some(count)),
            Ok(Fact::Wrong(text)) => anyhow::bail!("after a power cut: {text}"),
            Ok(fact) => known.learn(&fact),
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the machine ended by itself"),
        }
    }
    Ok(None)
}
