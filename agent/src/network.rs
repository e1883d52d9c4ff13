//! One interface with a fixed IPv4 address, netdevice(7), hosts(5) and resolv.conf(5).

use crate::frame::Failure;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::Deserialize;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path};

const ETC: &str = "/etc";
const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    interface: String,
    /// With its prefix: "10.0.2.15/24".
    address: String,
    gateway: Option<Ipv4Addr>,
    #[serde(default)]
    nameservers: Vec<std::net::IpAddr>,
}

/// Bring the loopback interface up, and the `network` if there is one.
pub fn bring_up(network: Option<&Network>, warnings: &mut Vec<String>) {
    let mut attempt = |what: &str, result: Result<(), Failure>| {
        if let Err(failure) = result {
            warnings.push(format!("{what}: {}", failure.message));
        }
    };
    let socket = match socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None) {
        Ok(socket) => socket,
        Err(error) => return attempt("network", Err(Failure::of("socket", error))),
    };
    attempt("lo", set_up(&socket, "lo"));
    attempt("hosts", write_hosts());
    if let Some(network) = network {
        attempt(&network.interface, configure(&socket, network));
        let lines = network.nameservers.iter().map(|server| format!("nameserver {server}\n"));
        attempt("resolv.conf", provide(Path::new(RESOLV_CONF), &lines.collect::<String>()));
    }
}

fn configure(socket: &OwnedFd, network: &Network) -> Result<(), Failure> {
    let (address, prefix) = parse_address(&network.address)?;
    let name = &network.interface;
    control(socket, libc::SIOCSIFADDR, name, |request| request.ifr_ifru.ifru_addr = socket_address(address))?;
    control(socket, libc::SIOCSIFNETMASK, name, |request| {
        request.ifr_ifru.ifru_netmask = socket_address(mask(prefix))
    })?;
    set_up(socket, name)?;
    let Some(gateway) = network.gateway else { return Ok(()) };
    // SAFETY: all zeroes is a route without anything.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads one rtentry, whose rt_dev is null.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &route) } < 0 {
        return Err(Failure::of(format_args!("route by {gateway}"), io::Error::last_os_error()));
    }
    Ok(())
}

fn parse_address(text: &str) -> Result<(Ipv4Addr, u32), Failure> {
    text.split_once('/')
        .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)))
        .filter(|(_, prefix)| *prefix <= 32)
        .ok_or_else(|| Failure::new(libc::EINVAL, format!("address {text:?}: not like 10.0.2.15/24")))
}

fn mask(prefix: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - prefix).unwrap_or(0))
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14]; // port, address, padding
    for (to, byte) in data[2..].iter_mut().zip(address.octets()) {
        *to = byte as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

/// Interface up; its other flags stay.
fn set_up(socket: &OwnedFd, name: &str) -> Result<(), Failure> {
    let request = control(socket, libc::SIOCGIFFLAGS, name, |_| {})?;
    // SAFETY: SIOCGIFFLAGS has written the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags } | libc::IFF_UP as libc::c_short;
    control(socket, libc::SIOCSIFFLAGS, name, |request| request.ifr_ifru.ifru_flags = flags).map(drop)
}

fn control(
    socket: &OwnedFd,
    code: libc::Ioctl,
    name: &str,
    fill: impl FnOnce(&mut libc::ifreq),
) -> Result<libc::ifreq, Failure> {
    // SAFETY: all zeroes is an ifreq without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Failure::new(libc::EINVAL, format!("interface {name:?}: the name is too long")));
    }
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    fill(&mut request);
    // SAFETY: each of these ioctls reads and writes one ifreq.
    if unsafe { libc::ioctl(socket.as_raw_fd(), code, &mut request) } < 0 {
        return Err(Failure::of("ioctl", io::Error::last_os_error()));
    }
    Ok(request)
}

/// Names that are the guest itself, where its root has none: images leave them to whoever runs them.
fn write_hosts() -> Result<(), Failure> {
    if fs::metadata(HOSTS).is_ok_and(|meta| meta.len() > 0) {
        return Ok(());
    }
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost\n");
    if let Some(name) = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()) {
        text += &format!("127.0.1.1\t{name}\n");
    }
    provide(Path::new(HOSTS), &text)
}

fn failure(path: &Path) -> impl Fn(io::Error) -> Failure + '_ {
    move |error| Failure::of(path.display(), error)
}

/// Have `path` hold `text` without writing to the root, which may be a user's own disk or directory: a file in /run is mounted
/// there. Only what isn't there at all is made.
fn provide(path: &Path, text: &str) -> Result<(), Failure> {
    if let (false, Ok(link)) = (path.exists(), fs::read_link(path)) {
        // To what a service makes that doesn't run here: "../run/systemd/resolve/stub-resolv.conf".
        let target = Path::new("/").join(link.strip_prefix("..").unwrap_or(&link));
        if target.starts_with("/run") && !target.components().any(|part| part == Component::ParentDir) {
            target.parent().map_or(Ok(()), fs::create_dir_all).map_err(failure(&target))?;
            return fs::write(&target, text).map_err(failure(&target));
        }
    }
    if !path.exists() {
        let _ = fs::create_dir(ETC);
        return fs::write(path, text).map_err(failure(path));
    }
    let own = Path::new("/run/kvmkit").join(path.file_name().unwrap_or_default());
    fs::create_dir_all("/run/kvmkit").and_then(|()| fs::write(&own, text)).map_err(failure(&own))?;
    mount(Some(&own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|error| Failure::of(path.display(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(parse_address("10.0.2.15/24").unwrap(), (Ipv4Addr::new(10, 0, 2, 15), 24));
        for wrong in ["", "10.0.2.15", "10.0.2/24", "10.0.2.15/33", "10.0.2.15/-1", "::1/64"] {
            assert!(parse_address(wrong).is_err(), "{wrong}");
        }
        for (prefix, expected) in [(0, "0.0.0.0"), (8, "255.0.0.0"), (20, "255.255.240.0"), (32, "255.255.255.255")] {
            assert_eq!(mask(prefix).to_string(), expected);
        }
    }

    #[test]
    fn socket_addresses_are_sockaddr_in() {
        let address = socket_address(Ipv4Addr::new(192, 168, 1, 2));
        assert_eq!(address.sa_family, libc::AF_INET as libc::sa_family_t);
        assert_eq!(address.sa_data.map(|byte| byte as u8), [0, 0, 192, 168, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
