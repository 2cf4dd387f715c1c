//! By which address this host is known to the others.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail, ensure};
use hvd_core::transport::tcp::source_address;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::message::Reserve;

/// Any port will do: nothing is sent there.
const SOME_PORT: u16 = 9;

/// Finds an address and a free port where the other hosts can meet rank 0, and holds the port.
///
/// Linux lets rank 0 listen there nevertheless: both sockets allow the address to be used again, as std's listeners do, and
/// ours does not listen (socket(7), SO_REUSEADDR). Nobody else is given the port meanwhile.
///
/// # Errors
/// Where no address can be found; the text says what to do.
pub fn reserve(wish: &Reserve) -> Result<(SocketAddr, OwnedFd)> {
    let ip = match (&wish.interface, reached_by_ssh()) {
        (Some(name), _) => of_interface(name)?,
        (None, Some(ip)) => ip,
        (None, None) => toward(&wish.toward)?,
    };
    let (address, socket) = hold_port(ip).with_context(|| format!("cannot reserve a port of {ip}"))?;
    Ok((address, socket))
}

/// The address at which `hvdrun` reached this host, where it came by ssh and not within one host.
fn reached_by_ssh() -> Option<IpAddr> {
    let connection = std::env::var("SSH_CONNECTION").ok()?;
    // client address, client port, server address, server port
    let ip: IpAddr = connection.split_whitespace().nth(2)?.parse().ok()?;
    (!ip.is_loopback()).then_some(ip)
}

/// Where the way to another host begins. A way within this host counts only where the other host's address is meant so.
fn toward(host: &str) -> Result<IpAddr> {
    const HINT: &str = "say over which interface the hosts talk: --network-interface NAME";
    let address = if host.contains(':') { format!("[{host}]:{SOME_PORT}") } else { format!("{host}:{SOME_PORT}") };
    let source = source_address(&address).with_context(|| format!("no way leads from here to {host}; {HINT}"))?;
    let meant = host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    ensure!(meant || !source.is_loopback(), "{host} is this host itself, seen from here; {HINT}");
    Ok(source)
}

/// The first address of an interface, IPv4 before IPv6; link-local ones do not count, as they need more than a number.
///
/// # Errors
/// If there is no such interface or it has no address; the text names those that there are.
pub fn of_interface(name: &str) -> Result<IpAddr> {
    let all: Vec<_> = nix::ifaddrs::getifaddrs().context("cannot list the network interfaces")?.collect();
    let ip = |entry: &nix::ifaddrs::InterfaceAddress| {
        let address = entry.address.as_ref()?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    let usable = |ip: &IpAddr| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let named = all.iter().filter(|entry| entry.interface_name == name);
    if let Some(ip) = named.filter_map(ip).filter(usable).min_by_key(IpAddr::is_ipv6) {
        return Ok(ip);
    }
    let mut names: Vec<_> = all.iter().map(|entry| entry.interface_name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    ensure!(names.contains(&name), "there is no network interface {name}; there are {}", names.join(", "));
    bail!("the network interface {name} has no address");
}

fn hold_port(ip: IpAddr) -> rustix::io::Result<(SocketAddr, OwnedFd)> {
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddr::new(ip, 0))?;
    let address = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
    Ok((address, socket))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn rank_0_can_listen_on_a_port_that_is_held() {
        let (address, _held) = hold_port(Ipv4Addr::LOCALHOST.into()).unwrap();
        assert!(TcpStream::connect(address).is_err(), "somebody listens");
        let listener = TcpListener::bind(address).unwrap();
        TcpStream::connect(address).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn an_interface_has_its_address() {
        assert_eq!(of_interface("lo").unwrap(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        let error = of_interface("no-such").unwrap_err().to_string();
        assert!(error.contains("no-such") && error.contains("lo"), "{error}");
    }

    #[test]
    fn the_way_to_another_host_must_lead_out() {
        assert_eq!(toward("127.0.0.3").unwrap(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        for host in ["no.such.host.invalid", "localhost"] {
            let error = format!("{:#}", toward(host).unwrap_err());
            assert!(error.contains("--network-interface") && error.contains(host), "{error}");
        }
    }
}
