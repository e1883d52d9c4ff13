//! The guest's init, process 1 of an initramfs: brings the guest up as `/etc/kvmkit/boot.json` says, then keeps the agent alive.
//!
//! Process 1 must not end, so it does little: it holds the vsock listener and reaps. The requests are served by a child, which it
//! starts again should it ever die. What goes wrong on the way up is a warning in the hello to the host where the guest is of use
//! without it, and power-off where it isn't.

use crate::exec::Environment;
use crate::frame::Failure;
use crate::network::{self, Network};
use crate::server::Server;
use crate::text::Text;
use base64::Engine;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};
use nix::sys::termios::tcdrain;
use nix::sys::time::TimeSpec;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::{ForkResult, Pid, chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};
use serde::Deserialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The agent listens here, and the host for its hello.
const PORT: u32 = 1024;
const DEVICE_WAIT: Duration = Duration::from_secs(10);
/// What processes get to end by themselves at shutdown.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(1);

/// `/etc/kvmkit/boot.json`, written by the monitor.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Boot {
    /// Kernel modules in the order to load them.
    modules: Vec<String>,
    hostname: Option<String>,
    /// None stays in the initramfs.
    root: Option<Root>,
    mounts: Vec<Share>,
    network: Option<Network>,
    environment: Environment,
    /// Base64 of random bytes from the host.
    seed: Option<String>,
    /// What to run on the console where there is no vsock, or always.
    fallback_command: Option<Fallback>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Root {
    /// A block device's path or a share's tag.
    device: Option<String>,
    tag: Option<String>,
    fstype: String,
    #[serde(default)]
    read_only: bool,
    /// Writes go to memory.
    #[serde(default)]
    overlay: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Share {
    tag: String,
    path: String,
    #[serde(default)]
    read_only: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fallback {
    argv: Vec<Text>,
    #[serde(default)]
    env: Environment,
    /// Beside the agent, too. Its end is the machine's.
    #[serde(default)]
    always: bool,
}

/// Say something on the console. Unlike println! it doesn't mind a console that is gone, and process 1 must not panic.
pub fn say(text: &str) {
    let _ = io::stdout().write_all(format!("{text}\n").as_bytes());
}

/// Be the init. Process 1 only.
pub fn run() -> ! {
    say("kvmkit: init");
    let mut warnings = vec![];
    mount_system(&mut warnings);
    let boot = read_boot().unwrap_or_else(|failure| {
        warnings.push(failure.message);
        Boot::default()
    });
    for module in &boot.modules {
        warn(&mut warnings, load_module(module));
    }
    if boot.modules.iter().any(|module| module.contains("virtio_console")) {
        open_console_again();
    }
    if let Some(name) = &boot.hostname {
        warn(&mut warnings, nix::unistd::sethostname(name).map_err(|error| Failure::of("hostname", error)));
    }
    if let Some(seed) = &boot.seed {
        warn(&mut warnings, add_entropy(seed));
    }
    if let Some(root) = &boot.root {
        if let Err(failure) = enter_root(root, &mut warnings) {
            power_off(&format!("root: {}", failure.message));
        }
    } else {
        warn(&mut warnings, make_directory("/tmp", 0o1777));
    }
    for share in &boot.mounts {
        warn(&mut warnings, mount_share(&share.tag, Path::new(&share.path), share.read_only));
    }
    network::bring_up(boot.network.as_ref(), &mut warnings);

    match (listen(), boot.fallback_command) {
        (Ok(listener), Some(command)) if command.always => {
            let leader = start_on_console(&command, &boot.environment);
            keep_serving(&listener, boot.environment, warnings, Some(leader))
        }
        (Ok(listener), _) => keep_serving(&listener, boot.environment, warnings, None),
        (Err(_), Some(command)) => {
            let leader = start_on_console(&command, &boot.environment);
            loop {
                end_with(leader, waitpid(None, None));
            }
        }
        (Err(failure), None) => power_off(&format!("no way to the host: {}", failure.message)),
    }
}

fn warn(warnings: &mut Vec<String>, result: Result<(), Failure>) {
    if let Err(failure) = result {
        warnings.push(failure.message);
    }
}

fn read_boot() -> Result<Boot, Failure> {
    let path = "/etc/kvmkit/boot.json";
    match fs::read(path) {
        Ok(json) => {
            serde_json::from_slice(&json).map_err(|error| Failure::new(libc::EINVAL, format!("{path}: {error}")))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Boot::default()),
        Err(error) => Err(Failure::of(path, error)),
    }
}

fn mount_one(source: &str, target: &Path, kind: &str, flags: MsFlags, data: Option<&str>) -> Result<(), Failure> {
    mount(Some(source), target, Some(kind), flags, data)
        .map_err(|error| Failure::of(format_args!("mount {source} ({kind}) at {}", target.display()), error))
}

fn make_directory(path: &str, mode: u32) -> Result<(), Failure> {
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|error| Failure::of(path, error))
}

/// The kernel's own file systems.
fn mount_system(warnings: &mut Vec<String>) {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let (nosuid, files) = (MsFlags::MS_NOSUID, MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
    for (target, kind, flags, data) in [
        ("/proc", "proc", plain, None),
        ("/sys", "sysfs", plain, None),
        ("/dev", "devtmpfs", nosuid, Some("mode=755")),
        ("/dev/pts", "devpts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some("mode=620,gid=5,ptmxmode=666")),
        ("/dev/shm", "tmpfs", files, Some("mode=1777")),
        ("/run", "tmpfs", files, Some("mode=755")),
    ] {
        let _ = fs::create_dir_all(target);
        match mount_one(kind, Path::new(target), kind, flags, data) {
            Err(failure) if failure.errno == libc::EBUSY => {} // the kernel did (CONFIG_DEVTMPFS_MOUNT)
            result => warn(warnings, result),
        }
    }
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let _ = std::os::unix::fs::symlink(format!("/proc/self/fd{target}"), format!("/dev/{link}"));
    }
}

fn load_module(path: &str) -> Result<(), Failure> {
    let file = File::open(path).map_err(|error| Failure::of(path, error))?;
    match nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(Failure::of(path, error)),
    }
}

/// What /dev/console was when the kernel opened it may not be the one to use once its driver is there.
fn open_console_again() {
    if let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") {
        let _ = (dup2_stdin(&console), dup2_stdout(&console), dup2_stderr(&console));
    }
}

/// Give the kernel random bytes and have it count them, random(4).
fn add_entropy(seed: &str) -> Result<(), Failure> {
    let bytes = base64::prelude::BASE64_STANDARD
        .decode(seed)
        .map_err(|error| Failure::new(libc::EINVAL, format!("seed: {error}")))?;
    let device = OpenOptions::new().write(true).open("/dev/urandom").map_err(|error| Failure::of("seed", error))?;
    let mut pool = Vec::with_capacity(8 + bytes.len()); // struct rand_pool_info: bits, bytes, data
    pool.extend_from_slice(&(bytes.len() as u32 * 8).to_ne_bytes());
    pool.extend_from_slice(&(bytes.len() as u32).to_ne_bytes());
    pool.extend_from_slice(&bytes);
    let request = nix::request_code_write!(b'R', 3, 8);
    // SAFETY: RNDADDENTROPY reads the two numbers and as many bytes as they say; the kernel does so byte by byte.
    if unsafe { libc::ioctl(device.as_raw_fd(), request as _, pool.as_ptr()) } < 0 {
        return Err(Failure::of("seed", io::Error::last_os_error()));
    }
    Ok(())
}

/// Make `root` the root directory, and take the system's mounts along.
fn enter_root(root: &Root, warnings: &mut Vec<String>) -> Result<(), Failure> {
    let source = match (&root.device, &root.tag) {
        (Some(device), None) => wait_for(device)?,
        (None, Some(tag)) => tag,
        _ => return Err(Failure::new(libc::EINVAL, "either a device or a tag")),
    };
    for directory in ["/newroot", "/lower", "/rw"] {
        make_directory(directory, 0o755)?;
    }
    let (new, lower) = (Path::new("/newroot"), Path::new("/lower"));
    let read_only = if root.read_only || root.overlay { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    mount_one(source, if root.overlay { lower } else { new }, &root.fstype, read_only, None)?;
    if root.overlay {
        mount_one("tmpfs", Path::new("/rw"), "tmpfs", MsFlags::empty(), Some("mode=755"))?;
        make_directory("/rw/upper", 0o755)?;
        make_directory("/rw/work", 0o755)?;
        let layers = "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work";
        mount_one("overlay", new, "overlay", MsFlags::empty(), Some(layers))?;
    }
    for name in ["proc", "sys", "dev", "run"] {
        let (old, target) = (format!("/{name}"), new.join(name));
        let _ = fs::create_dir(&target);
        let moved = mount(Some(old.as_str()), &target, None::<&str>, MsFlags::MS_MOVE, None::<&str>);
        warn(warnings, moved.map_err(|error| Failure::of(format_args!("move {old} into the root"), error)));
    }
    empty_initramfs();
    let switch = || {
        chdir(new)?;
        mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
        chroot(".")?;
        chdir("/")
    };
    switch().map_err(|error| Failure::of("switch to the root", error))?;
    if root.read_only && !root.overlay {
        warn(warnings, mount_one("tmpfs", Path::new("/tmp"), "tmpfs", MsFlags::empty(), Some("mode=1777")));
    }
    Ok(())
}

/// Wait until a device is there: drivers find some after their module is loaded.
fn wait_for(device: &str) -> Result<&str, Failure> {
    let deadline = Instant::now() + DEVICE_WAIT;
    while !Path::new(device).exists() {
        if Instant::now() >= deadline {
            return Err(Failure::new(libc::ENODEV, format!("{device}: there is no such device")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(device)
}

/// Give back the memory that the initramfs takes. What is mounted in it isn't of it.
fn empty_initramfs() {
    let (Ok(root), Ok(entries)) = (fs::metadata("/"), fs::read_dir("/")) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.dev() != root.dev() => {}
            Ok(meta) if meta.is_dir() => drop(fs::remove_dir_all(&path)),
            _ => drop(fs::remove_file(&path)),
        }
    }
}

/// Mount a directory that the host shares by virtiofs. Its mount point is made if need be.
pub fn mount_share(tag: &str, path: &Path, read_only: bool) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|error| Failure::of(path.display(), error))?;
    mount_one(tag, path, "virtiofs", if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() }, None)
}

/// A listener for the host's requests, if a vsock leads to it.
fn listen() -> Result<OwnedFd, Failure> {
    // AF_VSOCK opens without a device too, and then leads nowhere: vsock(7), IOCTL_VM_SOCKETS_GET_LOCAL_CID.
    let device = File::open("/dev/vsock").map_err(|error| Failure::of("/dev/vsock", error))?;
    let mut cid: u32 = 0;
    let request = nix::request_code_none!(7, 0xb9);
    // SAFETY: it writes one unsigned int.
    if unsafe { libc::ioctl(device.as_raw_fd(), request as _, &mut cid) } < 0 {
        return Err(Failure::of("/dev/vsock", io::Error::last_os_error()));
    }
    if cid <= libc::VMADDR_CID_HOST || cid == libc::VMADDR_CID_ANY {
        return Err(Failure::new(libc::ENODEV, "/dev/vsock: the guest has no vsock device"));
    }
    let open = || {
        let listener = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        socket::bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, PORT))?;
        socket::listen(&listener, Backlog::new(128)?)?;
        Ok(listener)
    };
    open().map_err(|error: Errno| Failure::of("vsock", error))
}

/// Process 1 from here on. The machine ends with `leader`, if there is one.
fn keep_serving(listener: &OwnedFd, environment: Environment, warnings: Vec<String>, leader: Option<Pid>) -> ! {
    let server = Arc::new(Server { environment, is_guest: true, warnings });
    let mut serving = start_server(listener, &server);
    let _hello = hello(&server.warnings); // open as long as the guest runs: its end tells the host
    loop {
        let waited = waitpid(None, None);
        if let Some(leader) = leader {
            end_with(leader, waited);
        }
        match waited {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if Some(pid) == serving => {
                say("kvmkit: the agent ended; it is started again");
                serving = start_server(listener, &server);
            }
            Err(Errno::ECHILD) => {
                std::thread::sleep(Duration::from_millis(100)); // no memory to fork, it seems
                serving = start_server(listener, &server);
            }
            _ => {}
        }
    }
}

fn start_server(listener: &OwnedFd, server: &Arc<Server>) -> Option<Pid> {
    // SAFETY: process 1 has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => Some(child),
        Ok(ForkResult::Child) => serve(listener, server),
        Err(_) => None,
    }
}

fn serve(listener: &OwnedFd, server: &Arc<Server>) -> ! {
    loop {
        match socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => {
                // SAFETY: the descriptor was just made.
                let stream = unsafe { OwnedFd::from_raw_fd(fd) };
                // By vsock_loopback any process of the guest could come.
                let from_host =
                    socket::getpeername::<VsockAddr>(fd).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST);
                if from_host {
                    server.accept(stream.into());
                }
            }
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(error) => {
                say(&format!("kvmkit: accept: {error}"));
                std::thread::sleep(Duration::from_millis(100)); // out of descriptors, which others free
            }
        }
    }
}

/// Tell the host that the guest is up. None if the host doesn't listen.
fn hello(warnings: &[String]) -> Option<File> {
    let stream = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).ok()?;
    socket::connect(stream.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, PORT)).ok()?;
    let mut stream = File::from(stream);
    let line = serde_json::json!({ "kvmkit-agent": 1, "pid": 1, "boot_ns": boot_ns(), "warnings": warnings });
    stream.write_all(format!("{line}\n").as_bytes()).ok()?;
    Some(stream)
}

/// Run the command on the console, in a process that `end_with` waits for.
fn start_on_console(command: &Fallback, environment: &Environment) -> Pid {
    let mut environment = environment.clone();
    environment.extend(command.env.clone());
    say("kvmkit: command");
    // SAFETY: process 1 has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => std::process::exit(lead(&command.argv, &environment)),
        Err(error) => power_off(&format!("fork: {error}")),
    }
}

/// If the process that has ended is `leader`, say on the console how, and end the machine.
fn end_with(leader: Pid, waited: nix::Result<WaitStatus>) {
    let status = match waited {
        Ok(WaitStatus::Exited(pid, status)) if pid == leader => status,
        Ok(WaitStatus::Signaled(pid, signal, _)) if pid == leader => 128 + signal as i32,
        Err(Errno::ECHILD) => 255,
        _ => return,
    };
    say(&format!("\nkvmkit: exit {status}"));
    stop_machine(RebootMode::RB_POWER_OFF)
}

/// Lead the console's session and run a command in it. When the leader of a terminal's session ends, Linux drops what the terminal
/// has not sent yet: so this is a process of its own, which waits for that.
fn lead(argv: &[Text], environment: &Environment) -> i32 {
    let _ = setsid();
    let console = console_name();
    match OpenOptions::new().read(true).write(true).open(&console) {
        Ok(terminal) => {
            let _ = (dup2_stdin(&terminal), dup2_stdout(&terminal), dup2_stderr(&terminal));
        }
        Err(error) => say(&format!("kvmkit: {console}: {error}")),
    }
    // SAFETY: no pointers.
    unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
    let Some((program, arguments)) = argv.split_first() else { return 127 };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(environment);
    if let Some(home) = environment.get("HOME").filter(|home| home.path().is_dir()) {
        command.current_dir(home.path());
    }
    // What is typed to interrupt the command must not end its waiting parent.
    let ignored = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGHUP];
    let handle = move |how: SigHandler| {
        for number in ignored {
            // SAFETY: neither handler is code of ours.
            let _ = unsafe { signal(number, how) };
        }
    };
    handle(SigHandler::SigIgn);
    // SAFETY: signal(2) alone is called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            handle(SigHandler::SigDfl);
            Ok(())
        });
    }
    let status = match command.spawn().and_then(|mut child| child.wait()) {
        Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        Err(error) => {
            let error_is_absent = error.kind() == io::ErrorKind::NotFound;
            say(&format!("{}: {}", program.path().display(), Failure::of("", error).message.trim_start_matches(": ")));
            if error_is_absent { 127 } else { 126 }
        }
    };
    let _ = tcdrain(io::stdout());
    status
}

/// The terminal behind /dev/console, which itself can't be a session's.
fn console_name() -> String {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let name = active.split_whitespace().last().filter(|name| *name != "tty0").unwrap_or("console");
    format!("/dev/{name}")
}

fn power_off(why: &str) -> ! {
    say(&format!("kvmkit: error {why}"));
    stop_machine(RebootMode::RB_POWER_OFF)
}

fn stop_machine(how: RebootMode) -> ! {
    let _ = tcdrain(io::stdout());
    nix::unistd::sync();
    loop {
        let _ = reboot(how); // it doesn't return but for an error
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// End all processes, write everything to disk, and power off or reboot.
pub fn shut_down(restart: bool) -> ! {
    let all = Pid::from_raw(-1); // all but process 1 and this
    let _ = kill(all, Signal::SIGTERM);
    let deadline = Instant::now() + SHUTDOWN_WAIT;
    while others_run() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = kill(all, Signal::SIGKILL);
    nix::unistd::sync();
    // A file system that can be is left clean; where files are still open for writing its journal sees to that.
    let remount = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let _ = mount(None::<&str>, "/", None::<&str>, remount, None::<&str>);
    stop_machine(if restart { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF })
}

/// Whether processes run beside init and the agent. A kernel thread and one that has ended have no command line.
fn others_run() -> bool {
    let own = [1, std::process::id()];
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        number.is_some_and(|number: u32| {
            !own.contains(&number) && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
        })
    })
}

/// Since the kernel started, suspension included.
pub fn boot_ns() -> i64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Set the wall clock, in nanoseconds since 1970.
pub fn set_time(ns: i64) -> Result<(), Failure> {
    let time = TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|error| Failure::of("clock_settime", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_files() {
        let boot: Boot = serde_json::from_str(
            r#"{"modules": ["/lib/modules/virtio.ko"], "hostname": "guest",
                "root": {"tag": "root", "fstype": "virtiofs", "read_only": true, "overlay": true},
                "mounts": [{"tag": "data", "path": "/data", "read_only": false}],
                "network": {"interface": "eth0", "address": "10.0.2.15/24", "gateway": "10.0.2.2",
                            "nameservers": ["10.0.2.3"]},
                "environment": {"PATH": "/bin"}, "seed": null,
                "fallback_command": {"argv": ["sh"], "env": {"A": "b"}}}"#,
        )
        .unwrap();
        assert!(boot.root.unwrap().overlay);
        assert_eq!(boot.fallback_command.unwrap().argv, [Text::Utf8("sh".into())]);
        assert!(serde_json::from_str::<Boot>("{}").is_ok());
        for wrong in ["null", r#"{"module": []}"#, r#"{"root": {"device": "/dev/vda"}}"#, r#"{"mounts": [{}]}"#] {
            assert!(serde_json::from_str::<Boot>(wrong).is_err(), "{wrong}");
        }
    }
}
