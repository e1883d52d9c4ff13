//! A command with its streams.
//!
//! One thread and one poll loop a command. Each of the three streams has a window: the sender may send so much, and more as WINDOW
//! frames grant it. So a stream that nobody takes stops alone, signals and the exit status always get through, and neither side
//! keeps more than a window.
//!
//! The command leads a new session and so a process group. Its end (EXIT) and the ends of its output (STREAM_END) are separate.
//! A process that the command left behind may hold the output open for ever. So once the command has ended, what is in the pipes
//! then is sent, which is all that it wrote itself, and what else comes within `GRACE`; then the stream is ended for the host.
//! The pipe is still read, for nobody: closing it would kill a service that the command started with SIGPIPE.

use crate::frame::*;
use crate::text::Text;
use crate::user;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

static SPAWN: Mutex<()> = Mutex::new(());

const GRACE: Duration = Duration::from_millis(200);
/// Between SIGHUP and SIGKILL, where the host is gone.
const HANG_UP: Duration = Duration::from_secs(1);
const STDIN: u8 = 0;
/// Grants smaller than this wait for more, unless the sender has nothing left.
const GRANT_BYTES: u32 = WINDOW_BYTES / 4;

/// The environment of commands, before a request adds to it.
pub type Environment = BTreeMap<String, Text>;

#[derive(Debug, Deserialize)]
pub struct Exec {
    argv: Vec<Text>,
    #[serde(default)]
    env: Environment,
    #[serde(default)]
    clear_env: bool,
    cwd: Option<Text>,
    user: Option<String>,
    pty: Option<Pty>,
    /// Else the command reads /dev/null.
    #[serde(default)]
    stdin: bool,
    /// What may be sent of each output before the first WINDOW frame.
    window_bytes: u32,
}

#[derive(Debug, Deserialize)]
struct Pty {
    rows: u16,
    cols: u16,
    term: String,
}

/// Run `exec` for the host at the other end of `connection`, until the command and its output have ended or the host hangs up.
pub fn run(mut connection: Connection, exec: Exec, base: &Environment) -> Result<(), Failure> {
    let window_bytes = exec.window_bytes;
    let (child, streams) = match spawn(exec, base) {
        Ok(started) => started,
        Err(failure) => {
            connection.fail(&failure);
            return Ok(());
        }
    };
    let left_over = Session::new(connection, child, streams, window_bytes)?.serve()?;
    discard(left_over);
    Ok(())
}

/// Our ends of the command's streams.
struct Streams {
    stdin: Option<File>,
    outputs: [Option<File>; 2],
    is_pty: bool,
}

fn spawn(exec: Exec, base: &Environment) -> Result<(Child, Streams), Failure> {
    let mut argv = exec.argv.into_iter().map(OsString::from);
    let program = argv.next().ok_or_else(|| Failure::new(libc::EINVAL, "exec: argv is empty"))?;
    let user = exec.user.as_deref().map(user::look_up).transpose()?;
    let mut environment = if exec.clear_env { Environment::new() } else { base.clone() };
    if let (false, Some(entry)) = (exec.clear_env, user.as_ref().and_then(|user| user.entry.as_ref())) {
        for (name, value) in
            [("HOME", &entry.home), ("USER", &entry.name), ("LOGNAME", &entry.name), ("SHELL", &entry.shell)]
        {
            environment.insert(name.into(), Text::Utf8(value.clone()));
        }
    }
    if let Some(pty) = &exec.pty {
        environment.insert("TERM".into(), Text::Utf8(pty.term.clone()));
    }
    environment.extend(exec.env);
    if let Some(name) = environment.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(Failure::new(libc::EINVAL, format!("environment variable {name:?}: not a name")));
    }
    let cwd = match exec.cwd {
        Some(cwd) => {
            let meta = std::fs::metadata(cwd.path());
            let meta = meta.map_err(|error| Failure::of(format_args!("working directory {:?}", cwd.path()), error))?;
            if !meta.is_dir() {
                return Err(Failure::of(
                    format_args!("working directory {:?}", cwd.path()),
                    io::Error::from_raw_os_error(libc::ENOTDIR),
                ));
            }
            cwd
        }
        None => environment
            .get("HOME")
            .filter(|home| home.path().is_dir())
            .cloned()
            .unwrap_or_else(|| Text::Utf8("/".into())),
    };

    // openpty(3) can't make its descriptors close-on-exec: another command, started meanwhile, would hold this terminal open.
    let _alone = SPAWN.lock();
    let mut command = Command::new(&program);
    command.args(argv).env_clear().envs(&environment).current_dir(cwd.path());
    let mut streams = Streams { stdin: None, outputs: [None, None], is_pty: exec.pty.is_some() };
    if let Some(pty) = &exec.pty {
        let size = Winsize { ws_row: pty.rows, ws_col: pty.cols, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).map_err(|error| Failure::of("openpty", error))?;
        set_close_on_exec(&master).map_err(|error| Failure::of("openpty", error))?;
        set_close_on_exec(&slave).map_err(|error| Failure::of("openpty", error))?;
        let clone = || slave.try_clone().map_err(|error| Failure::of("dup", error));
        command.stdin(clone()?).stdout(clone()?).stderr(slave);
        let master = File::from(master);
        if exec.stdin {
            streams.stdin = Some(master.try_clone().map_err(|error| Failure::of("dup", error))?);
        }
        streams.outputs[0] = Some(master);
    } else {
        command.stdin(if exec.stdin { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let ids = user.map(|user| (user.uid, user.gid, user.groups));
    let is_pty = streams.is_pty;
    // SAFETY: between fork and exec only system calls are made, nothing is allocated and no lock is taken.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if is_pty && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            if let Some((uid, gid, groups)) = &ids {
                nix::unistd::setgroups(groups)?;
                nix::unistd::setgid(*gid)?;
                nix::unistd::setuid(*uid)?;
            }
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(|error| Failure::of(program.to_string_lossy(), error))?;
    if !is_pty {
        streams.stdin = child.stdin.take().map(|pipe| OwnedFd::from(pipe).into());
        streams.outputs[0] = child.stdout.take().map(|pipe| OwnedFd::from(pipe).into());
        streams.outputs[1] = child.stderr.take().map(|pipe| OwnedFd::from(pipe).into());
    }
    Ok((child, streams))
}

fn set_close_on_exec(file: &OwnedFd) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).map(drop)
}

fn set_nonblocking(file: &File) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// What waits in a pipe or terminal.
fn unread_bytes(file: &File) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::FIONREAD, &mut count) } < 0 { 0 } else { count as usize }
}

/// A stream from the command to the host.
struct Output {
    file: Option<File>,
    /// What the host still takes.
    credit: u32,
    /// Once the command has ended: what it had written and is still to be read.
    remaining: Option<usize>,
}

struct Session {
    stream: std::os::unix::net::UnixStream,
    decoder: Decoder,
    child: Child,
    process: File,
    /// Frames on their way to the host, and how much of them is gone.
    outgoing: Vec<u8>,
    sent: usize,
    outputs: [Output; 2],
    is_pty: bool,
    stdin: Option<File>,
    input: VecDeque<u8>,
    input_ended: bool,
    /// What the host may still send of stdin, and what it wasn't told of yet.
    input_credit: u32,
    ungranted: u32,
    last_input: u8,
    exited: Option<Instant>,
}

impl Session {
    fn new(connection: Connection, child: Child, streams: Streams, window_bytes: u32) -> Result<Self, Failure> {
        let Connection { stream, decoder } = connection;
        // SAFETY: no pointers; the result is checked and owned by nobody else.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        if process < 0 {
            let failure = Failure::of("pidfd_open (Linux 5.3)", io::Error::last_os_error());
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            return Err(failure);
        }
        // SAFETY: the descriptor was just made.
        let process = unsafe { File::from_raw_fd(process as i32) };
        for file in [&streams.stdin, &streams.outputs[0], &streams.outputs[1]].into_iter().flatten() {
            set_nonblocking(file).map_err(|error| Failure::of("O_NONBLOCK", error))?;
        }
        stream.set_nonblocking(true).map_err(|error| Failure::of("O_NONBLOCK", error))?;
        let mut outgoing = Vec::new();
        encode(&mut outgoing, STARTED, serde_json::json!({ "pid": child.id() }).to_string().as_bytes());
        let outputs = streams.outputs.map(|file| Output { file, credit: window_bytes, remaining: None });
        Ok(Session {
            stream,
            decoder,
            child,
            process,
            outgoing,
            sent: 0,
            outputs,
            is_pty: streams.is_pty,
            stdin: streams.stdin,
            input: VecDeque::new(),
            input_ended: false,
            input_credit: WINDOW_BYTES,
            ungranted: 0,
            last_input: b'\n',
            exited: None,
        })
    }

    /// Until all is said or the host is gone. Gives the outputs that somebody still holds open.
    fn serve(mut self) -> Result<Vec<File>, Failure> {
        let mut left_over = Vec::new();
        let result = self.pump(&mut left_over);
        if let Err(failure) = &result {
            encode(&mut self.outgoing, ERROR, &failure.json());
            let _ = self.send();
        }
        if self.exited.is_none() {
            self.hang_up();
        }
        let _ = self.child.wait();
        // The host closes first: what it still sends would else reset the connection, and lose what is on its way to it.
        let _ = self.stream.set_nonblocking(false);
        let _ = io::copy(&mut self.stream, &mut io::sink());
        result.map(|()| left_over)
    }

    /// An error, or nothing more to be said, ends it.
    fn pump(&mut self, left_over: &mut Vec<File>) -> Result<(), Failure> {
        self.obey()?; // what came together with the request
        loop {
            let Some(ready) = self.wait()? else { return Ok(()) };
            let [socket, stdin, first, second, process] = ready;
            if socket.intersects(!PollFlags::POLLOUT) && !self.receive()? {
                return Ok(());
            }
            if stdin.contains(PollFlags::POLLERR) {
                self.close_stdin();
            } else if !stdin.is_empty() {
                self.feed();
            }
            for (index, events) in [first, second].into_iter().enumerate() {
                if !events.is_empty() && self.outgoing.is_empty() {
                    self.take_output(index);
                    self.send()?;
                }
            }
            if !process.is_empty() && self.exited.is_none() {
                self.note_exit()?;
            }
            self.end_outputs(left_over);
            self.send()?;
        }
    }

    /// What is ready: the socket, stdin, stdout, stderr, the process. None when there is nothing more to wait for.
    fn wait(&self) -> Result<Option<[PollFlags; 5]>, Failure> {
        let none = PollFlags::empty();
        let output = |output: &Output| match output {
            Output { file: Some(_), credit: 1.., .. } if self.outgoing.is_empty() => Some(PollFlags::POLLIN),
            _ => None,
        };
        let mut wanted = [
            Some(if self.outgoing.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT }),
            // With no events wanted a pipe still tells that its reader is gone.
            self.stdin.as_ref().map(|_| if self.input.is_empty() { none } else { PollFlags::POLLOUT }),
            output(&self.outputs[0]),
            output(&self.outputs[1]),
            self.exited.is_none().then_some(PollFlags::POLLIN),
        ];
        if self.is_pty && self.input.is_empty() {
            wanted[1] = None; // a terminal hangs up at its end, which its output tells
        }
        if self.exited.is_some() && self.outgoing.is_empty() && self.outputs.iter().all(|output| output.file.is_none())
        {
            return Ok(None);
        }
        let files = [
            Some(self.stream.as_fd()),
            self.stdin.as_ref().map(AsFd::as_fd),
            self.outputs[0].file.as_ref().map(AsFd::as_fd),
            self.outputs[1].file.as_ref().map(AsFd::as_fd),
            Some(self.process.as_fd()),
        ];
        let (mut polled, mut places) = (Vec::with_capacity(5), Vec::with_capacity(5));
        for (place, (file, events)) in files.into_iter().zip(wanted).enumerate() {
            if let (Some(file), Some(events)) = (file, events) {
                polled.push(PollFd::new(file, events));
                places.push(place);
            }
        }
        let timeout = match self.deadline() {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::NONE)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Failure::of("poll", error)),
        }
        let mut ready = [none; 5];
        for (fd, place) in polled.iter().zip(places) {
            ready[place] = fd.revents().unwrap_or(none);
        }
        Ok(Some(ready))
    }

    /// When streams that are still open are ended, if one waits for that alone.
    fn deadline(&self) -> Option<Instant> {
        let waits = self.outputs.iter().any(|output| output.file.is_some() && output.remaining == Some(0));
        self.exited.filter(|_| waits && self.outgoing.is_empty()).map(|exited| exited + GRACE)
    }

    /// Take what the host sent; false where it is gone.
    fn receive(&mut self) -> Result<bool, Failure> {
        match self.decoder.read_from(&mut self.stream) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => return Ok(false),
        }
        self.obey().map(|()| true)
    }

    /// Do what the frames say that are here.
    fn obey(&mut self) -> Result<(), Failure> {
        let group = Pid::from_raw(self.child.id() as i32);
        while let Some((kind, payload)) = self.decoder.next()? {
            match (kind, payload) {
                (STREAM, [0, data @ ..]) if self.input_ended => {
                    return Err(protocol(format!("{} bytes of stdin after its end", data.len())));
                }
                (STREAM, [0, data @ ..]) => {
                    let size = data.len() as u32;
                    self.input_credit = self
                        .input_credit
                        .checked_sub(size)
                        .ok_or_else(|| protocol(format!("{size} bytes of stdin beyond its window")))?;
                    if self.stdin.is_some() {
                        self.input.extend(data);
                    } // else nobody reads it, which the host was told
                }
                (STREAM_END, [0]) => self.input_ended = true,
                (STREAM_CLOSE, [index @ 1..=2]) => self.outputs[*index as usize - 1].file = None,
                (WINDOW, [index @ 1..=2, size @ ..]) if size.len() == 4 => {
                    let size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
                    let credit = &mut self.outputs[*index as usize - 1].credit;
                    *credit = credit.checked_add(size).ok_or_else(|| protocol("a window beyond 4 GiB"))?;
                }
                (SIGNAL, [number]) => {
                    let signal = Signal::try_from(i32::from(*number))
                        .map_err(|_| protocol(format!("signal {number}: there is none")))?;
                    if self.exited.is_none() {
                        let _ = killpg(group, signal); // it isn't reaped yet, so the number is still its own
                    }
                }
                (WINSIZE, &[r0, r1, c0, c1]) => {
                    let size = Winsize {
                        ws_row: u16::from_le_bytes([r0, r1]),
                        ws_col: u16::from_le_bytes([c0, c1]),
                        ws_xpixel: 0,
                        ws_ypixel: 0,
                    };
                    if let (true, Some(master)) = (self.is_pty, &self.outputs[0].file) {
                        // SAFETY: TIOCSWINSZ reads one winsize.
                        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
                    }
                }
                (kind, payload) => {
                    return Err(protocol(format!("a frame of type {kind}, {} bytes, for a command", payload.len())));
                }
            }
        }
        self.feed();
        Ok(())
    }

    /// Write to the command's stdin what there is for it.
    fn feed(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        while !self.input.is_empty() {
            match stdin.write(self.input.as_slices().0) {
                Ok(count) => {
                    self.last_input = self.input[count - 1];
                    self.input.drain(..count);
                    self.ungranted += count as u32;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.close_stdin(), // EPIPE; EIO of a terminal
            }
        }
        if self.input_ended && self.input.is_empty() {
            if self.is_pty {
                // What a person types: at the start of a line it is the end, else it sends the line as it is.
                let end = end_of_file(stdin);
                let _ = stdin.write(if self.last_input == b'\n' { &end[..1] } else { &end });
            }
            self.stdin = None;
        } else if self.ungranted >= GRANT_BYTES || (self.ungranted > 0 && self.input.is_empty()) {
            self.input_credit += self.ungranted;
            let grant = std::mem::take(&mut self.ungranted);
            let mut payload = [STDIN, 0, 0, 0, 0];
            payload[1..].copy_from_slice(&grant.to_le_bytes());
            encode(&mut self.outgoing, WINDOW, &payload);
        }
    }

    /// Nobody reads the command's stdin any more.
    fn close_stdin(&mut self) {
        self.stdin = None;
        self.input.clear();
        encode(&mut self.outgoing, STREAM_CLOSE, &[STDIN]);
    }

    /// Read an output once into `outgoing`, which is empty.
    fn take_output(&mut self, index: usize) {
        let output = &mut self.outputs[index];
        let Some(file) = &mut output.file else { return };
        let size = (MAX_PAYLOAD_BYTES - 1).min(output.credit as usize);
        self.outgoing.resize(HEADER_BYTES + 1 + size, 0);
        let count = match file.read(&mut self.outgoing[HEADER_BYTES + 1..]) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                self.outgoing.clear();
                return;
            }
            Err(_) => 0, // a terminal's end is EIO
        };
        self.outgoing.truncate(HEADER_BYTES + 1 + count);
        if count == 0 {
            output.file = None;
            self.outgoing.clear();
            encode(&mut self.outgoing, STREAM_END, &[index as u8 + 1]);
            return;
        }
        output.credit -= count as u32;
        output.remaining = output.remaining.map(|remaining| remaining.saturating_sub(count));
        self.outgoing[0] = STREAM;
        self.outgoing[1..HEADER_BYTES].copy_from_slice(&(count as u32 + 1).to_le_bytes());
        self.outgoing[HEADER_BYTES] = index as u8 + 1;
    }

    /// The command has ended: say so, and see what is left of its output.
    fn note_exit(&mut self) -> Result<(), Failure> {
        let status = self.child.wait().map_err(|error| Failure::of("wait", error))?;
        let exit = match (status.code(), status.signal()) {
            (Some(code), _) => serde_json::json!({ "code": code }),
            (None, signal) => serde_json::json!({ "signal": signal }),
        };
        encode(&mut self.outgoing, EXIT, exit.to_string().as_bytes());
        self.exited = Some(Instant::now());
        self.stdin = None;
        self.input.clear();
        for output in &mut self.outputs {
            output.remaining = output.file.as_ref().map(unread_bytes);
        }
        Ok(())
    }

    /// End the streams whose time is over.
    fn end_outputs(&mut self, left_over: &mut Vec<File>) {
        if self.deadline().is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        for (index, output) in self.outputs.iter_mut().enumerate() {
            if let Some(file) = output.file.take_if(|_| output.remaining == Some(0)) {
                left_over.push(file);
                encode(&mut self.outgoing, STREAM_END, &[index as u8 + 1]);
            }
        }
    }

    /// Send of `outgoing` what the socket takes.
    fn send(&mut self) -> Result<(), Failure> {
        while self.sent < self.outgoing.len() {
            match self.stream.write(&self.outgoing[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::of("send", error)),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// The host is gone: nothing stays of the command's process group.
    fn hang_up(&mut self) {
        let group = Pid::from_raw(self.child.id() as i32);
        self.stdin = None;
        self.outputs.iter_mut().for_each(|output| output.file = None);
        let _ = killpg(group, Signal::SIGHUP);
        let _ = killpg(group, Signal::SIGCONT); // a stopped one wouldn't notice
        let mut polled = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut polled, PollTimeout::try_from(HANG_UP).unwrap_or(PollTimeout::ZERO));
        let _ = killpg(group, Signal::SIGKILL); // not reaped yet: the group's number is still its own
    }
}

/// The terminal's VEOF character, twice.
fn end_of_file(terminal: &File) -> [u8; 2] {
    let settings = nix::sys::termios::tcgetattr(terminal);
    [settings.map_or(4, |settings| settings.control_chars[libc::VEOF]); 2]
}

/// Read for nobody until the last writer is gone.
fn discard(files: Vec<File>) {
    let mut files = files;
    let mut buffer = [0; 4096];
    while !files.is_empty() {
        let mut polled: Vec<_> = files.iter().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut polled, PollTimeout::NONE).is_err_and(|error| error != nix::errno::Errno::EINTR) {
            return;
        }
        files.retain_mut(|file| match file.read(&mut buffer) {
            Ok(count) => count > 0,
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        });
    }
}
