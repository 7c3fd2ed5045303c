//! Network interfaces of the host that move into a container (`linux.netDevices`), over route netlink.
//!
//! Spec: OCI runtime-spec, config-linux.md, "Network Devices". An interface is taken down, moved and renamed in one request,
//! gets back its permanent addresses of global scope, which the kernel drops on the way, and is brought up. When the
//! container's network namespace ends, the kernel hands physical interfaces back and removes virtual ones.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::error::{Context, Error, Result};
use crate::spec::linux::NetDevice;
use crate::sys;

/// Longest name of an interface (IFNAMSIZ without its zero byte).
const MAX_NAME: usize = 15;
/// Largest answer of the kernel in one packet.
const BUFFER: usize = 64 << 10;

// linux/netlink.h and linux/rtnetlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_PERMANENT: u8 = 0x80;
const SCOPE_UNIVERSE: u8 = 0;
const IFF_UP: u32 = 1;
const HEADER: usize = 16;
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;

/// Checks names as the kernel would, before anything is made.
pub(crate) fn validate(devices: &HashMap<String, NetDevice>) -> Result<()> {
    let usable = |name: &str| {
        !name.is_empty()
            && name.len() <= MAX_NAME
            && name != "."
            && name != ".."
            && !name
                .contains(|letter: char| letter == '/' || letter == ':' || letter.is_whitespace())
    };
    let mut targets = Vec::new();
    for (name, device) in devices {
        for name in [name, &device.name]
            .into_iter()
            .filter(|name| !name.is_empty())
        {
            if !usable(name) {
                return Err(Error::Spec(format!(
                    "netDevices: {name:?} is no name of a network interface"
                )));
            }
        }
        let target = device.target(name);
        if name.is_empty() || targets.contains(&target) {
            return Err(Error::Spec(format!(
                "netDevices: the name {target:?} is given twice"
            )));
        }
        if !target.contains('%') {
            targets.push(target);
        }
    }
    Ok(())
}

impl NetDevice {
    fn target<'a>(&'a self, name: &'a str) -> &'a str {
        if self.name.is_empty() {
            name
        } else {
            &self.name
        }
    }
}

/// Moves the interfaces into the network namespace.
pub(crate) fn move_into(
    devices: &HashMap<String, NetDevice>,
    namespace: BorrowedFd<'_>,
) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let here = Netlink::open().context(|| "open a netlink socket")?;
    let there = open_in(namespace)?;
    for (name, device) in devices.iter().collect::<BTreeMap<_, _>>() {
        let target = device.target(name);
        move_one(&here, &there, name, target, namespace)
            .map_err(|error| Error::Process(format!("move network interface {name:?}: {error}")))?;
    }
    Ok(())
}

/// A netlink socket of another network namespace. The caller has one thread, which is back before this returns.
fn open_in(namespace: BorrowedFd<'_>) -> Result<Netlink> {
    let own = rustix::fs::open(
        "/proc/self/ns/net",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open own network namespace")?;
    sys::setns(namespace, libc::CLONE_NEWNET)
        .context(|| "enter the container's network namespace")?;
    let socket = Netlink::open();
    sys::setns(own.as_fd(), libc::CLONE_NEWNET)
        .context(|| "return to the own network namespace")?;
    socket.context(|| "open a netlink socket in the container's network namespace")
}

fn move_one(
    here: &Netlink,
    there: &Netlink,
    name: &str,
    target: &str,
    namespace: BorrowedFd<'_>,
) -> Result<()> {
    if name == "lo" {
        // The kernel would refuse as well, but only after the machine's own loopback was taken down.
        return Err(Error::Spec(
            "the loopback interface belongs to its namespace".into(),
        ));
    }
    let links = here.links().context(|| "list interfaces")?;
    let Some(index) = links
        .iter()
        .find(|(_, found)| *found == name)
        .map(|(index, _)| *index)
    else {
        return Err(Error::Spec("there is no such interface".into()));
    };
    let addresses = here.addresses(index).context(|| "read its addresses")?;
    let before = there
        .links()
        .context(|| "list the container's interfaces")?;
    here.set_up(index, false).context(|| "take it down")?;
    let mut request = link(index, 0, 0);
    let descriptor = namespace.as_raw_fd().cast_unsigned();
    attribute(&mut request, IFLA_NET_NS_FD, &descriptor.to_ne_bytes());
    attribute(&mut request, IFLA_IFNAME, &zero_ended(target));
    if let Err(error) = here.change(NEW_LINK, 0, &request) {
        // It stays here, and whoever uses it must not suffer. What went wrong first is what counts.
        let _ = here.set_up(index, true);
        return Err(error).context(|| format!("as {target:?}"));
    }
    let after = there
        .links()
        .context(|| "list the container's interfaces")?;
    let moved = after.iter().find(|(index, _)| !before.contains_key(index));
    let Some((&index, _)) = moved else {
        return Err(Error::State("it did not arrive".into()));
    };
    for address in addresses {
        there
            .change(NEW_ADDRESS, CREATE, &address.on(index))
            .context(|| "give back an address")?;
    }
    there.set_up(index, true).context(|| "bring it up")
}

/// An address as the kernel described it: header fields and the attributes that make it up.
struct Address {
    family: u8,
    prefix: u8,
    attributes: Vec<u8>,
}

impl Address {
    fn on(&self, index: u32) -> Vec<u8> {
        let mut body = vec![self.family, self.prefix, IFA_F_PERMANENT, SCOPE_UNIVERSE];
        body.extend(index.to_ne_bytes());
        body.extend(&self.attributes);
        body
    }
}

fn zero_ended(text: &str) -> Vec<u8> {
    text.bytes().chain([0]).collect()
}

/// The body of a link request.
fn link(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for word in [index, flags, change] {
        body.extend(word.to_ne_bytes());
    }
    body
}

fn attribute(body: &mut Vec<u8>, kind: u16, data: &[u8]) {
    let length = u16::try_from(4 + data.len()).expect("attributes here are short");
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(data);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Pieces that start with their own length (messages: 4 bytes of it, attributes: 2), each padded to four bytes.
fn pieces(
    mut bytes: &[u8],
    length: fn(&[u8], usize) -> Option<usize>,
) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let piece = bytes.get(..length(bytes, 0)?)?;
        // An empty piece would never end.
        if piece.len() < 4 {
            return None;
        }
        bytes = bytes
            .get(piece.len().next_multiple_of(4)..)
            .unwrap_or_default();
        Some(piece)
    })
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    pieces(bytes, |bytes, at| u16_at(bytes, at).map(usize::from))
        .filter_map(|piece| Some((u16_at(piece, 2)?, &piece[4..])))
}

/// A route netlink socket.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> rustix::io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )
        .map(Self)
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> rustix::io::Result<()> {
        let mut message = Vec::with_capacity(HEADER + body.len());
        let length = u32::try_from(HEADER + body.len()).expect("requests here are short");
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | REQUEST).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        rustix::net::send(&self.0, &message, SendFlags::empty()).map(drop)
    }

    /// Answers up to the end of a list or an acknowledgement: kind and body of each.
    fn receive(&self, mut take: impl FnMut(u16, &[u8])) -> rustix::io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let (length, _) = rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
            let length_of = |bytes: &[u8], at: usize| {
                u32_at(bytes, at).and_then(|word| usize::try_from(word).ok())
            };
            for message in pieces(&buffer[..length.min(BUFFER)], length_of) {
                let kind = u16_at(message, 4).unwrap_or(NLMSG_DONE);
                let body = message.get(HEADER..).unwrap_or_default();
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = u32_at(body, 0).map_or(-libc::EIO, u32::cast_signed);
                        return match code {
                            0 => Ok(()),
                            code => Err(rustix::io::Errno::from_raw_os_error(-code)),
                        };
                    }
                    kind => take(kind, body),
                }
            }
        }
    }

    fn change(&self, kind: u16, flags: u16, body: &[u8]) -> rustix::io::Result<()> {
        self.send(kind, flags | ACKNOWLEDGE, body)?;
        self.receive(|_, _| {})
    }

    fn set_up(&self, index: u32, up: bool) -> rustix::io::Result<()> {
        self.change(
            NEW_LINK,
            0,
            &link(index, if up { IFF_UP } else { 0 }, IFF_UP),
        )
    }

    /// Names of the interfaces by index.
    fn links(&self) -> rustix::io::Result<BTreeMap<u32, String>> {
        self.send(GET_LINK, DUMP, &link(0, 0, 0))?;
        let mut found = BTreeMap::new();
        self.receive(|_, body| {
            let Some(index) = u32_at(body, 4) else { return };
            let rest = body.get(LINK_HEADER..).unwrap_or_default();
            for (_, data) in attributes(rest).filter(|(kind, _)| *kind == IFLA_IFNAME) {
                let name = data.split(|byte| *byte == 0).next().unwrap_or_default();
                found.insert(index, String::from_utf8_lossy(name).into_owned());
            }
        })?;
        Ok(found)
    }

    /// Permanent addresses of global scope of an interface.
    fn addresses(&self, index: u32) -> rustix::io::Result<Vec<Address>> {
        self.send(GET_ADDRESS, DUMP, &[0; ADDRESS_HEADER])?;
        let mut found = Vec::new();
        self.receive(|_, body| {
            let Some(&[family, prefix, flags, scope]) = body.first_chunk() else {
                return;
            };
            if u32_at(body, 4) != Some(index)
                || flags & IFA_F_PERMANENT == 0
                || scope != SCOPE_UNIVERSE
            {
                return;
            }
            let mut kept = Vec::new();
            for (kind, data) in attributes(body.get(ADDRESS_HEADER..).unwrap_or_default()) {
                if matches!(kind, IFA_ADDRESS | IFA_LOCAL | IFA_BROADCAST) {
                    attribute(&mut kept, kind, data);
                }
            }
            found.push(Address {
                family,
                prefix,
                attributes: kept,
            });
        })?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(pairs: &[(&str, &str)]) -> HashMap<String, NetDevice> {
        let device = |name: &str| NetDevice { name: name.into() };
        pairs
            .iter()
            .map(|(from, to)| ((*from).to_owned(), device(to)))
            .collect()
    }

    #[test]
    fn names_are_checked_before_anything_is_moved() {
        validate(&devices(&[
            ("eth1", ""),
            ("eth2", "net0"),
            ("eth3", "net%d"),
            ("eth4", "net%d"),
        ]))
        .unwrap();
        for wrong in [
            &[("eth1", "a/b")][..],
            &[("eth1", "longer-than-fifteen")],
            &[("eth1", "two words")],
            &[("eth1", "..")],
            &[("eth1", "eth2"), ("eth2", "")],
            &[("", "x")],
        ] {
            assert!(validate(&devices(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_loopback_is_listed_with_its_index() {
        let links = Netlink::open().unwrap().links().unwrap();
        assert!(links.values().any(|name| name == "lo"), "{links:?}");
    }

    #[test]
    fn attributes_that_lie_about_their_length_end_the_list() {
        let mut bytes = Vec::new();
        attribute(&mut bytes, 7, b"abcde");
        assert_eq!(attributes(&bytes).collect::<Vec<_>>(), [(7, &b"abcde"[..])]);
        bytes.extend([0; 4]);
        bytes.extend([255, 255, 1, 0]);
        assert_eq!(attributes(&bytes).count(), 1);
    }
}
