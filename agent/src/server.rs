//! What the agent does for the host: one request a connection.

use crate::exec::{self, Environment, Exec};
use crate::files;
use crate::frame::*;
use crate::init;
use crate::tcp;
use crate::text::Text;
use serde::Deserialize;
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Request {
    Exec(Exec),
    Read {
        path: Text,
    },
    Write {
        path: Text,
        mode: Option<u32>,
        mtime_ns: Option<u64>,
    },
    Pack {
        path: Text,
    },
    Unpack {
        path: Text,
    },
    Stat {
        path: Text,
        #[serde(default)]
        follow: bool,
    },
    List {
        path: Text,
    },
    Remove {
        path: Text,
        #[serde(default)]
        recursive: bool,
    },
    Mkdir {
        path: Text,
        #[serde(default)]
        parents: bool,
    },
    Rename {
        path: Text,
        to: Text,
    },
    /// Becomes a TCP connection to a port of the guest's own.
    Connect {
        port: u16,
    },
    Info,
    SetTime {
        ns: i64,
    },
    Mount {
        tag: String,
        path: Text,
        #[serde(default)]
        read_only: bool,
    },
    Umount {
        path: Text,
    },
    Shutdown {
        #[serde(default)]
        reboot: bool,
    },
}

/// What all connections share.
pub struct Server {
    /// Of commands.
    pub environment: Environment,
    /// Whether this is the guest's own agent, which may do to the machine what an ordinary process on a host must not.
    pub is_guest: bool,
    /// What went wrong at boot.
    pub warnings: Vec<String>,
}

impl Server {
    /// Serve a connection on a thread of its own.
    pub fn accept(self: &Arc<Self>, stream: UnixStream) {
        let server = self.clone();
        let thread = std::thread::Builder::new().stack_size(256 << 10);
        if let Err(error) = thread.spawn(move || server.serve(stream)) {
            init::say(&format!("kvmkit: a request is refused: {error}"));
        }
    }

    fn serve(&self, stream: UnixStream) {
        let mut connection = Connection::new(stream);
        let request = match connection.receive() {
            Ok(Some((REQUEST, json))) => {
                serde_json::from_slice(&json).map_err(|error| protocol(format!("request: {error}")))
            }
            Ok(Some((kind, _))) => Err(protocol(format!("the first frame is of type {kind}, no request"))),
            Ok(None) => return,
            Err(failure) => Err(failure),
        };
        let result = match request {
            Ok(Request::Exec(exec)) => {
                let _ = exec::run(connection, exec, &self.environment);
                return;
            }
            Ok(Request::Connect { port }) => match tcp::connect(port) {
                Ok(tcp) => {
                    if connection.reply(&json!({})).is_ok() {
                        tcp::splice(connection.stream, tcp);
                    }
                    return;
                }
                Err(failure) => Err(failure),
            },
            Ok(Request::Read { path }) => files::read(&mut connection, path.path()).map(|()| None),
            Ok(Request::Pack { path }) => files::pack(&mut connection, path.path()).map(|()| None),
            Ok(Request::List { path }) => files::list(&mut connection, path.path()).map(|()| None),
            Ok(request) => self.answer(&mut connection, request).map(Some),
            Err(failure) => Err(failure),
        };
        match result {
            Ok(Some(reply)) => drop(connection.reply(&reply)),
            Ok(None) => {}
            Err(failure) => connection.fail(&failure),
        }
    }

    fn answer(&self, connection: &mut Connection, request: Request) -> Result<Value, Failure> {
        if !self.is_guest
            && matches!(
                request,
                Request::SetTime { .. } | Request::Mount { .. } | Request::Umount { .. } | Request::Shutdown { .. }
            )
        {
            return Err(Failure::new(libc::EPERM, "this agent runs in no guest"));
        }
        match request {
            Request::Write { path, mode, mtime_ns } => files::write(connection, path.path(), mode, mtime_ns),
            Request::Unpack { path } => files::unpack(connection, path.path()),
            Request::Stat { path, follow } => files::stat(path.path(), follow),
            Request::Remove { path, recursive } => files::remove(path.path(), recursive),
            Request::Mkdir { path, parents } => files::mkdir(path.path(), parents),
            Request::Rename { path, to } => files::rename(path.path(), to.path()),
            Request::Info => Ok(self.info()),
            Request::SetTime { ns } => init::set_time(ns).map(|()| json!({})),
            Request::Mount { tag, path, read_only } => {
                init::mount_share(&tag, path.path(), read_only).map(|()| json!({}))
            }
            Request::Umount { path } => {
                nix::mount::umount(path.path()).map_err(|error| Failure::of(path.path().display(), error))?;
                Ok(json!({}))
            }
            Request::Shutdown { reboot } => {
                let _ = connection.reply(&json!({}));
                init::shut_down(reboot)
            }
            Request::Exec(_)
            | Request::Connect { .. }
            | Request::Read { .. }
            | Request::Pack { .. }
            | Request::List { .. } => unreachable!(),
        }
    }

    fn info(&self) -> Value {
        let name = nix::sys::utsname::uname().ok();
        let field = |get: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| name.as_ref().map(|n| Text::of(get(n)));
        json!({
            "agent": env!("CARGO_PKG_VERSION"),
            "kernel": field(|name| name.release()),
            "machine": field(|name| name.machine()),
            "hostname": field(|name| name.nodename()),
            "uptime_ns": init::boot_ns(),
            "warnings": self.warnings,
        })
    }
}
