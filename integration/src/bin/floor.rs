//! Lives containers' lives with nothing but the kernel: `floor [COUNT]` prints the microseconds of
//! each, one a line; without a count it lives one for each line it reads, until the end of input.

use std::io::{BufRead as _, Write as _};

use lighter_integration::Floor;

fn main() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("floor-").tempdir()?;
    let mut floor = Floor::new(dir.path())?;
    let mut out = std::io::stdout();
    let mut live = || -> anyhow::Result<()> {
        writeln!(out, "{}", floor.live()?.as_micros())?;
        Ok(out.flush()?)
    };
    if let Some(count) = std::env::args().nth(1) {
        for _ in 0..count.parse::<u32>()? {
            live()?;
        }
        return Ok(());
    }
    for line in std::io::stdin().lock().lines() {
        line?;
        live()?;
    }
    Ok(())
}
