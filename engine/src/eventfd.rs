//! irqfd and ioeventfd (`virt/kvm/eventfd.c`), without the GIL.
//!
//! As in the kernel, an eventfd is known by itself, not by the number that a process calls it: assigned by one
//! number, it can be taken back by another, and a number that was closed and given out again names another
//! one. What is assigned is a duplicate, so the caller may close its own.

use crate::vm::Vm;
use std::collections::HashMap;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

/// A duplicate of a caller's eventfd.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    /// Equal for descriptors of one eventfd.
    id: u64,
}

impl EventFd {
    pub fn new() -> Result<Self> {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, id: id(fd)? })
    }
    /// EBADF: not open; EINVAL: not an eventfd.
    pub fn duplicate(fd: i32) -> Result<Self> {
        // SAFETY: a plain system call.
        let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if own < 0 {
            // EINVAL would be that of a number out of range.
            let e = Error::last_os_error();
            return Err(if e.raw_os_error() == Some(libc::EINVAL) { Error::from_raw_os_error(libc::EBADF) } else { e });
        }
        // SAFETY: just opened, and nobody else's.
        let own = unsafe { OwnedFd::from_raw_fd(own) };
        Ok(Self { id: id(own.as_raw_fd())?, fd: own })
    }
    /// Add 1.
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from a local. It fails on a full counter alone, whose reader has been told already.
        unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
    }
    /// Reset to 0, without waiting; false if it was.
    fn take(&self) -> bool {
        let mut count = 0u64;
        let buffer = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 8 };
        // Others may read it too: not to wait must not depend on whether O_NONBLOCK is set.
        // SAFETY: reads at most 8 bytes into a local.
        let n = unsafe { libc::preadv2(self.fd.as_raw_fd(), &buffer, 1, -1, libc::RWF_NOWAIT) };
        if n < 0 && matches!(Error::last_os_error().raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
            // Before Linux 5.8.
            // SAFETY: as above.
            return unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) } == 8;
        }
        n == 8
    }
}

/// Which eventfd `fd` is. EINVAL: none.
fn id(fd: i32) -> Result<u64> {
    let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else {
        // Without /proc it is known by its number.
        return Ok(1 << 63 | fd as u64);
    };
    let field = |name: &str| info.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim().parse().ok());
    if field("eventfd-count:").is_none() {
        return Err(Error::from_raw_os_error(libc::EINVAL));
    }
    // Before Linux 5.2 there is no id.
    Ok(field("eventfd-id:").flatten().unwrap_or(1 << 63 | fd as u64))
}

/// A write that signals an eventfd instead of exiting (KVM_IOEVENTFD).
#[derive(Debug)]
pub struct IoEvent {
    pub address: u64,
    /// 0: any length.
    pub len: u32,
    pub datamatch: Option<u64>,
    pub fd: EventFd,
    pub pio: bool,
}

impl IoEvent {
    fn same_place(&self, other: &IoEvent) -> bool {
        (self.pio, self.address) == (other.pio, other.address)
    }
    /// Would one write be for both?
    pub fn collides(&self, other: &IoEvent) -> bool {
        let (a, b) = (self.datamatch, other.datamatch);
        self.same_place(other)
            && (self.len == 0 || other.len == 0 || self.len == other.len && (a.is_none() || b.is_none() || a == b))
    }
    pub fn same(&self, other: &IoEvent) -> bool {
        self.same_place(other) && (self.len, self.datamatch, self.fd.id) == (other.len, other.datamatch, other.fd.id)
    }
    pub fn matches(&self, pio: bool, address: u64, len: usize, value: u64) -> bool {
        (self.pio, self.address) == (pio, address)
            && (self.len == 0 || self.len as usize == len)
            && self.datamatch.is_none_or(|d| d == value)
    }
}

/// An eventfd whose signals are edges on a GSI (KVM_IRQFD).
struct IrqFd {
    fd: EventFd,
    gsi: u32,
}

/// The irqfds of a VM and the thread that waits for them.
pub struct IrqFds {
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

struct Watch {
    epoll: OwnedFd,
    stop: EventFd,
    /// By the key of its epoll entry; keys are not used again.
    fds: Mutex<HashMap<u64, IrqFd>>,
    next: AtomicU64,
}

const STOP: u64 = 0;

impl IrqFds {
    pub fn start(vm: &Arc<Vm>) -> Result<Self> {
        // SAFETY: a plain system call.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let watch = Arc::new(Watch { epoll, stop: EventFd::new()?, fds: Mutex::default(), next: AtomicU64::new(1) });
        watch.add(&watch.stop, STOP)?;
        let (worker, vm) = (watch.clone(), Arc::downgrade(vm));
        let thread = std::thread::Builder::new().name("kvm-irqfd".into()).spawn(move || worker.run(&vm))?;
        Ok(Self { watch, thread: Some(thread) })
    }
    /// EBUSY: the eventfd raises a GSI already. If it is signalled, it raises the GSI at once.
    pub fn assign(&self, fd: EventFd, gsi: u32) -> Result<()> {
        let mut fds = self.watch.fds.lock().unwrap();
        if fds.values().any(|i| i.fd.id == fd.id) {
            return Err(Error::from_raw_os_error(libc::EBUSY));
        }
        let key = self.watch.next.fetch_add(1, Ordering::Relaxed);
        self.watch.add(&fd, key)?;
        fds.insert(key, IrqFd { fd, gsi });
        Ok(())
    }
    /// When this returns, nothing more comes from `fd`. False if it raised nothing.
    pub fn deassign(&self, fd: &EventFd, gsi: u32) -> bool {
        let mut fds = self.watch.fds.lock().unwrap();
        let key = fds.iter().find_map(|(&k, i)| (i.fd.id == fd.id && i.gsi == gsi).then_some(k));
        // The duplicate's end alone would not take it out of the epoll set: the caller's descriptor keeps it open.
        let gone = key.and_then(|k| fds.remove(&k));
        if let Some(i) = &gone {
            // SAFETY: valid descriptors.
            unsafe {
                libc::epoll_ctl(
                    self.watch.epoll.as_raw_fd(),
                    libc::EPOLL_CTL_DEL,
                    i.fd.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                )
            };
        }
        gone.is_some()
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        self.watch.stop.signal();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Watch {
    fn add(&self, fd: &EventFd, key: u64) -> Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: key };
        // SAFETY: valid descriptors and structure.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.fd.as_raw_fd(), &mut event) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }
    fn run(&self, vm: &Weak<Vm>) {
        loop {
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
            // SAFETY: a valid buffer of 16 events.
            let n = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), 16, -1) };
            for e in &events[..n.max(0) as usize] {
                let key = e.u64;
                if key == STOP {
                    return;
                }
                let Some(vm) = vm.upgrade() else { return };
                // Held until the edge is delivered, so that `deassign` waits for it.
                let fds = self.fds.lock().unwrap();
                if let Some(i) = fds.get(&key)
                    && i.fd.take()
                {
                    vm.irq.edge_or_queue(&vm, i.gsi);
                }
                drop(fds);
            }
        }
    }
}
