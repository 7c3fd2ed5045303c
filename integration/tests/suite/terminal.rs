//! Interactive use in a real terminal, through `script`.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lighter_integration::{Cli, Daemon, Image, Result};

const NAME: &str = "docker.io/test/busybox:latest";

/// A command inside a pseudo-terminal, talked to line by line.
pub(crate) struct Terminal {
    child: std::process::Child,
    seen: std::sync::Arc<std::sync::Mutex<String>>,
    stdin: std::process::ChildStdin,
}

impl Terminal {
    pub(crate) fn open(command: &Command) -> Result<Self> {
        let mut line = format!(
            "stty rows 33 cols 120; exec {}",
            quote(command.get_program())
        );
        for arg in command.get_args() {
            line.push(' ');
            line.push_str(&quote(arg));
        }
        let mut child = Command::new("script")
            .args([
                "--quiet",
                "--return",
                "--flush",
                "--command",
                &line,
                "/dev/null",
            ])
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let seen = std::sync::Arc::<std::sync::Mutex<String>>::default();
        let into = seen.clone();
        let mut stdout = child.stdout.take().expect("piped");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = stdout.read(&mut buffer) {
                if n == 0 {
                    break;
                }
                into.lock()
                    .expect("no panic")
                    .push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        let stdin = child.stdin.take().expect("piped");
        Ok(Self { child, seen, stdin })
    }

    pub(crate) fn send(&mut self, text: &str) -> Result {
        self.stdin.write_all(text.as_bytes())?;
        Ok(self.stdin.flush()?)
    }

    pub(crate) fn expect(&self, text: &str) -> Result {
        let begun = Instant::now();
        while !self.seen.lock().expect("no panic").contains(text) {
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "no {text:?} in {:?}",
                self.seen.lock()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub(crate) fn code(mut self) -> Result<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code().unwrap_or(-1));
            }
            if begun.elapsed() > Duration::from_secs(30) {
                self.child.kill()?;
                anyhow::bail!("it never ended: {:?}", self.seen.lock());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn quote(text: &std::ffi::OsStr) -> String {
    format!("'{}'", text.to_string_lossy().replace('\'', "'\\''"))
}

async fn shell(pick: fn(&Daemon) -> Cli) -> Result {
    let daemon = Daemon::start().await?;
    let file = daemon.dir().join("busybox.tar");
    std::fs::write(&file, Image::busybox(NAME)?.oci_archive()?)?;
    daemon
        .debian_ctr()
        .run(&["images", "import", file.to_str().expect("UTF-8")])?
        .ok()?;
    let ctr = pick(&daemon);
    let mut terminal = Terminal::open(&ctr.command(&["run", "--rm", "-t", NAME, "tty", "sh"]))?;
    terminal.expect("# ")?;
    terminal.send("tty; stty size\n")?;
    terminal.expect("/dev/pts/0")?;
    terminal.expect("33 120")?;
    terminal.send("echo a''b\n")?;
    terminal.expect("ab")?;
    // Ctrl-C ends the foreground command, not the shell.
    terminal.send("sleep 1000\n")?;
    std::thread::sleep(Duration::from_millis(300));
    terminal.send("\x03")?;
    terminal.send("echo still''here\n")?;
    terminal.expect("stillhere")?;
    terminal.send("exit 7\n")?;
    assert_eq!(terminal.code()?, 7);
    daemon.finish().await
}

#[tokio::test]
async fn debian_ctr_gives_an_interactive_shell() -> Result {
    shell(Daemon::debian_ctr).await
}

#[tokio::test]
async fn our_ctr_gives_an_interactive_shell() -> Result {
    shell(Daemon::our_ctr).await
}
