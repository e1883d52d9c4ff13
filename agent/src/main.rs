//! kvmkit's guest agent: the guest's init, and the host's hands in it.
//!
//! As `/init` of an initramfs it sets the guest up (`init`) and serves the host over vsock (`server`, `frame`). With
//! `--listen unix:PATH` the same server runs as an ordinary process, for tests.

mod exec;
mod files;
mod frame;
mod init;
mod network;
mod server;
mod tcp;
mod text;
mod user;

use std::os::unix::net::UnixListener;
use std::sync::Arc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--listen", address] if address.starts_with("unix:") => listen(&address["unix:".len()..]),
        _ if std::process::id() == 1 => init::run(),
        _ => {
            eprintln!(
                "usage: kvmkit-agent --listen unix:PATH\nWithout arguments it is the init of a guest, process 1."
            );
            std::process::exit(2);
        }
    }
}

fn listen(path: &str) {
    let listener = UnixListener::bind(path).unwrap_or_else(|error| {
        eprintln!("kvmkit-agent: {path}: {error}");
        std::process::exit(1);
    });
    println!("kvmkit-agent: listening");
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, text::Text::of(&value))))
        .collect();
    let server = Arc::new(server::Server { environment, is_guest: false, warnings: vec![] });
    for stream in listener.incoming().flatten() {
        server.accept(stream);
    }
}
