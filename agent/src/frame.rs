//! Frames: `type u8, length u32 LE, payload`. The other end is `kvmkit.client.agent.protocol`, which describes them.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

pub const REQUEST: u8 = 1;
pub const DATA: u8 = 2;
pub const END: u8 = 3;
pub const REPLY: u8 = 4;
pub const ERROR: u8 = 5;
pub const STARTED: u8 = 6;
pub const STREAM: u8 = 7;
pub const STREAM_END: u8 = 8;
pub const STREAM_CLOSE: u8 = 9;
pub const WINDOW: u8 = 10;
pub const SIGNAL: u8 = 11;
pub const WINSIZE: u8 = 12;
pub const EXIT: u8 = 13;

pub const HEADER_BYTES: usize = 5;
pub const MAX_PAYLOAD_BYTES: usize = 64 << 10;
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// What the host may send into a command's stdin before the first WINDOW frame.
pub const WINDOW_BYTES: u32 = 256 << 10;

/// What goes back to the host instead of an answer.
#[derive(Debug)]
pub struct Failure {
    pub errno: i32,
    pub message: String,
}

impl Failure {
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Failure { errno, message: message.into() }
    }

    /// An error of the system, and what was to be done.
    pub fn of(what: impl std::fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let raw = system_error(&error);
        let errno = raw.unwrap_or(match error.kind() {
            io::ErrorKind::InvalidInput => libc::EINVAL, // NUL in a name
            _ => libc::EIO,
        });
        let reason = match raw {
            Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
            None => error.to_string(),
        };
        Failure::new(errno, format!("{what}: {reason}"))
    }

    /// The payload of an ERROR frame.
    pub fn json(&self) -> Vec<u8> {
        let mut end = self.message.len().min(4096);
        while !self.message.is_char_boundary(end) {
            end -= 1;
        }
        serde_json::json!({ "errno": self.errno, "message": self.message[..end] }).to_string().into_bytes()
    }
}

/// The system's error in `error` or in what that was made of.
fn system_error(error: &io::Error) -> Option<i32> {
    let mut cause = error.raw_os_error();
    let mut next = error.get_ref().and_then(|inner| inner.source());
    while let (None, Some(inner)) = (cause, next) {
        cause = inner.downcast_ref::<io::Error>().and_then(system_error);
        next = inner.source();
    }
    cause
}

pub fn protocol(message: impl Into<String>) -> Failure {
    Failure::new(libc::EPROTO, message)
}

/// Cuts what was received into frames.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// Read once from `source`; 0 is its end.
    pub fn read_from(&mut self, source: &mut impl Read) -> io::Result<usize> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let old = self.buffer.len();
        self.buffer.resize(old + HEADER_BYTES + MAX_PAYLOAD_BYTES, 0);
        let result = source.read(&mut self.buffer[old..]);
        self.buffer.truncate(old + result.as_ref().map_or(0, |count| *count));
        result
    }

    /// The next frame, if all of it is here.
    pub fn next(&mut self) -> Result<Option<(u8, &[u8])>, Failure> {
        let rest = &self.buffer[self.taken..];
        let Some((header, rest)) = rest.split_at_checked(HEADER_BYTES) else { return Ok(None) };
        let kind = header[0];
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let limit = if kind == REQUEST { MAX_REQUEST_BYTES } else { MAX_PAYLOAD_BYTES };
        if length > limit {
            return Err(protocol(format!("a frame of type {kind} with {length} bytes; at most {limit}")));
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        self.taken += HEADER_BYTES + length;
        Ok(Some((kind, payload)))
    }
}

/// Append a frame to `out`.
pub fn encode(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
}

/// A connection that is read and written a frame at a time, waiting. A vsock's descriptor serves as a unix socket's: only
/// read(2), write(2) and O_NONBLOCK are used.
pub struct Connection {
    pub stream: UnixStream,
    pub decoder: Decoder,
}

impl Connection {
    pub fn new(stream: UnixStream) -> Self {
        Connection { stream, decoder: Decoder::default() }
    }

    /// Wait for a frame; None where the host is gone.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>, Failure> {
        loop {
            if let Some((kind, payload)) = self.decoder.next()? {
                return Ok(Some((kind, payload.to_vec())));
            }
            match self.decoder.read_from(&mut self.stream) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::of("receive", error)),
            }
        }
    }

    pub fn send(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
        encode(&mut frame, kind, payload);
        self.stream.write_all(&frame)
    }

    pub fn reply(&mut self, value: &serde_json::Value) -> io::Result<()> {
        self.send(REPLY, value.to_string().as_bytes())
    }

    /// The last frame of a request that failed. A host that is gone doesn't care.
    pub fn fail(&mut self, failure: &Failure) {
        let _ = self.send(ERROR, &failure.json());
    }
}

/// What is written goes out as DATA frames.
pub struct DataWriter<'a>(pub &'a mut Connection);

impl Write for DataWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let data = &data[..data.len().min(MAX_PAYLOAD_BYTES)];
        self.0.send(DATA, data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what the host sends in DATA frames, up to its END.
pub struct DataReader<'a> {
    connection: &'a mut Connection,
    current: Vec<u8>,
    taken: usize,
    ended: bool,
}

impl<'a> DataReader<'a> {
    pub fn new(connection: &'a mut Connection) -> Self {
        DataReader { connection, current: Vec::new(), taken: 0, ended: false }
    }
}

impl Read for DataReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.current.len() && !self.ended {
            match self.connection.receive() {
                Ok(Some((DATA, data))) => (self.current, self.taken) = (data, 0),
                Ok(Some((END, _))) => self.ended = true,
                Ok(Some((kind, _))) => {
                    return Err(io::Error::other(format!("a frame of type {kind} where DATA or END was to come")));
                }
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(failure) => return Err(io::Error::other(failure.message)),
            }
        }
        let count = into.len().min(self.current.len() - self.taken);
        into[..count].copy_from_slice(&self.current[self.taken..][..count]);
        self.taken += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(bytes: &[u8], piece: usize) -> Result<Vec<(u8, Vec<u8>)>, Failure> {
        let (mut decoder, mut found) = (Decoder::default(), Vec::new());
        for mut part in bytes.chunks(piece) {
            decoder.read_from(&mut part).unwrap();
            while let Some((kind, payload)) = decoder.next()? {
                found.push((kind, payload.to_vec()));
            }
        }
        Ok(found)
    }

    #[test]
    fn frames_come_out_however_they_are_cut() {
        let mut bytes = Vec::new();
        encode(&mut bytes, DATA, b"abc");
        encode(&mut bytes, END, b"");
        encode(&mut bytes, STREAM, &[7; 1000]);
        for piece in [1, 2, 5, 7, 4096] {
            let found = frames(&bytes, piece).unwrap();
            assert_eq!(found, [(DATA, b"abc".to_vec()), (END, vec![]), (STREAM, vec![7; 1000])]);
        }
    }

    #[test]
    fn a_length_too_large_is_refused_before_it_is_waited_for() {
        let header = |kind, length: usize| [&[kind][..], &(length as u32).to_le_bytes()].concat();
        assert!(frames(&header(DATA, MAX_PAYLOAD_BYTES), 5).is_ok());
        assert!(frames(&header(DATA, MAX_PAYLOAD_BYTES + 1), 5).is_err());
        assert!(frames(&header(REQUEST, MAX_PAYLOAD_BYTES + 1), 5).is_ok());
        assert!(frames(&header(REQUEST, MAX_REQUEST_BYTES + 1), 5).is_err());
    }
}
