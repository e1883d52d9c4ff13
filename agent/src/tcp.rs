//! A connection of the host's that goes on to a TCP port in the guest.

use crate::frame::Failure;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

/// Connect to a port of this machine, by whichever loopback it is open at.
pub fn connect(port: u16) -> Result<TcpStream, Failure> {
    TcpStream::connect(("127.0.0.1", port))
        .or_else(|_| TcpStream::connect(("::1", port)))
        .map_err(|error| Failure::of(format_args!("port {port}"), error))
}

/// Copy both ways until both have ended. The end of one is passed on alone.
pub fn splice(host: UnixStream, port: TcpStream) {
    let _ = port.set_nodelay(true);
    let (Ok(mut from_host), Ok(mut to_port)) = (host.try_clone(), port.try_clone()) else { return };
    let inward = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
        let _ = io::copy(&mut from_host, &mut to_port);
        let _ = to_port.shutdown(Shutdown::Write);
    });
    let (mut from_port, mut to_host) = (&port, &host);
    let _ = io::copy(&mut from_port, &mut to_host);
    let _ = host.shutdown(Shutdown::Write);
    if let Ok(thread) = inward {
        let _ = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn bytes_go_both_ways_and_each_end_is_passed_on() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = connect(listener.local_addr().unwrap().port()).unwrap();
        let (mut service, _) = listener.accept().unwrap();
        let (mut client, ours) = UnixStream::pair().unwrap();
        let splicing = std::thread::spawn(move || splice(ours, port));
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut asked = String::new();
        service.read_to_string(&mut asked).unwrap();
        service.write_all(b"answer").unwrap();
        drop(service);
        let mut answered = String::new();
        client.read_to_string(&mut answered).unwrap();
        splicing.join().unwrap();
        assert_eq!((asked.as_str(), answered.as_str()), ("question", "answer"));
    }

    #[test]
    fn a_port_that_nobody_listens_at() {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        assert_eq!(connect(port).unwrap_err().errno, libc::ECONNREFUSED);
    }
}
