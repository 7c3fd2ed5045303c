//! Counters of a pod's network interfaces, as its first process sees them.

use std::io::Read as _;

/// Largest table that is read.
const MAX_TABLE_BYTES: u64 = 1 << 20;

/// One interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) received: Direction,
    pub(crate) sent: Direction,
}

/// One direction of traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Direction {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) errors: u64,
    pub(crate) dropped: u64,
}

/// The interfaces in the network namespace of a process, without loopback.
pub(crate) fn interfaces(pid: u32) -> Vec<Interface> {
    let Ok(file) = std::fs::File::open(format!("/proc/{pid}/net/dev")) else {
        return Vec::new();
    };
    let mut table = String::new();
    // A process that ends meanwhile has none.
    let _ = file.take(MAX_TABLE_BYTES).read_to_string(&mut table);
    parse(&table)
}

/// Spec: proc(5), `/proc/net/dev`: eight numbers received, then eight sent.
fn parse(table: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let mut numbers = numbers.split_whitespace();
        let mut direction = || {
            let mut values = [0_u64; 8];
            for value in &mut values {
                *value = numbers.next()?.parse().ok()?;
            }
            let [bytes, packets, errors, dropped, ..] = values;
            Some(Direction {
                bytes,
                packets,
                errors,
                dropped,
            })
        };
        Some(Interface {
            name: name.trim().to_owned(),
            received: direction()?,
            sent: direction()?,
        })
    };
    let interfaces = table.lines().filter_map(line);
    interfaces.filter(|i| i.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_without_loopback() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0
  eth0: 1234 10 1 2 0 0 0 0 4321 20 3 4 0 0 0 0
  bad0: 1 2
";
        let interfaces = parse(table);
        assert_eq!(interfaces.len(), 1, "{interfaces:?}");
        let received = Direction {
            bytes: 1234,
            packets: 10,
            errors: 1,
            dropped: 2,
        };
        assert_eq!(
            (interfaces[0].name.as_str(), interfaces[0].received),
            ("eth0", received)
        );
        assert_eq!(
            (interfaces[0].sent.bytes, interfaces[0].sent.dropped),
            (4321, 4)
        );
    }
}
