//! From interrupt lines, messages and eventfds to local APICs, without the GIL.
//!
//! The PIC and the IOAPIC are Python (`kvmkit/kvm/soft/x86`). What they decide is compiled into a table: for each
//! GSI, the messages that an edge on it sends. An edge on a GSI whose table entry is complete is delivered
//! here at once; any other is queued for Python (`take_lines`), which is woken by an eventfd.

use crate::lapic::{self, Message};
use crate::vm::Vm;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock, Weak};

/// What an edge on a GSI does.
#[derive(Clone, Debug, Default)]
pub struct Route {
    pub messages: Vec<Message>,
    /// The PIC, a level-triggered or a masked pin takes part: Python must see the edge.
    pub python: bool,
}

/// A write that signals an eventfd instead of exiting (KVM_IOEVENTFD).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEvent {
    pub address: u64,
    /// 0: any length.
    pub len: u32,
    pub datamatch: Option<u64>,
    pub fd: i32,
    pub pio: bool,
}

#[derive(Default)]
pub struct Irq {
    pub routes: RwLock<HashMap<u32, Route>>,
    pub events: RwLock<Vec<IoEvent>>,
    /// Edges for Python to look at.
    lines: Mutex<Vec<u32>>,
    irqfds: Mutex<Option<Arc<IrqFds>>>,
}

impl Irq {
    /// An edge on `gsi`. True if it was delivered here, false if Python has to.
    pub fn edge(&self, vm: &Vm, gsi: u32) -> bool {
        let routes = self.routes.read().unwrap();
        match routes.get(&gsi) {
            Some(r) if !r.python => {
                for m in &r.messages {
                    lapic::deliver(vm, *m, None);
                }
                true
            }
            Some(_) => false,
            None => true,
        }
    }
    /// An edge from a thread that has no Python: what it cannot deliver waits for `take_lines`.
    pub fn edge_or_queue(&self, vm: &Vm, gsi: u32) {
        if !self.edge(vm, gsi) {
            self.lines.lock().unwrap().push(gsi);
            vm.wake_python();
        }
    }
    pub fn take_lines(&self) -> Vec<u32> {
        std::mem::take(&mut self.lines.lock().unwrap())
    }
    /// Signal the eventfds that a write of `data` matches; false if none does.
    pub fn io_event(&self, pio: bool, address: u64, data: &[u8]) -> bool {
        let events = self.events.read().unwrap();
        if events.is_empty() {
            return false;
        }
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        let mut hit = false;
        for e in events.iter() {
            if e.pio == pio
                && e.address == address
                && (e.len == 0 || e.len as usize == data.len())
                && e.datamatch.is_none_or(|d| d == value)
            {
                signal(e.fd);
                hit = true;
            }
        }
        hit
    }
    pub fn add_irqfd(&self, vm: &Arc<Vm>, fd: i32, gsi: u32) -> std::io::Result<()> {
        let mut guard = self.irqfds.lock().unwrap();
        if guard.is_none() {
            *guard = Some(IrqFds::start(vm)?);
        }
        guard.as_ref().unwrap().add(fd, gsi)
    }
    pub fn remove_irqfd(&self, fd: i32, gsi: u32) -> bool {
        self.irqfds.lock().unwrap().as_ref().is_some_and(|i| i.remove(fd, gsi))
    }
}

impl Drop for Irq {
    fn drop(&mut self) {
        if let Some(i) = self.irqfds.lock().unwrap().take() {
            signal(i.stop);
        }
    }
}

/// Add 1 to an eventfd.
pub fn signal(fd: i32) {
    let one = 1u64;
    // SAFETY: writes 8 bytes from a local; a closed or full descriptor is an error that nobody waits for.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

/// The thread that waits for irqfds.
struct IrqFds {
    epoll: i32,
    stop: i32,
    /// Own duplicates of the callers' descriptors: (caller's fd, gsi) → duplicate.
    fds: Mutex<HashMap<(i32, u32), i32>>,
}

impl IrqFds {
    fn start(vm: &Arc<Vm>) -> std::io::Result<Arc<Self>> {
        // SAFETY: plain system calls; the descriptors are owned by the new object.
        let (epoll, stop) = unsafe { (libc::epoll_create1(libc::EPOLL_CLOEXEC), libc::eventfd(0, libc::EFD_CLOEXEC)) };
        if epoll < 0 || stop < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let this = Arc::new(Self { epoll, stop, fds: Mutex::default() });
        this.watch(stop, u64::MAX)?;
        let (worker, vm) = (this.clone(), Arc::downgrade(vm));
        std::thread::Builder::new().name("kvm-irqfd".into()).spawn(move || worker.run(&vm))?;
        Ok(this)
    }
    fn watch(&self, fd: i32, data: u64) -> std::io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: data };
        // SAFETY: valid descriptors and structure.
        if unsafe { libc::epoll_ctl(self.epoll, libc::EPOLL_CTL_ADD, fd, &mut event) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }
    fn add(&self, fd: i32, gsi: u32) -> std::io::Result<()> {
        let mut fds = self.fds.lock().unwrap();
        if fds.contains_key(&(fd, gsi)) {
            return Err(std::io::Error::from_raw_os_error(libc::EBUSY));
        }
        // SAFETY: a plain system call.
        let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if own < 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EBADF));
        }
        if let Err(e) = self.watch(own, (own as u64) << 32 | gsi as u64) {
            // SAFETY: our own duplicate.
            unsafe { libc::close(own) };
            return Err(std::io::Error::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EINVAL)));
        }
        fds.insert((fd, gsi), own);
        Ok(())
    }
    fn remove(&self, fd: i32, gsi: u32) -> bool {
        match self.fds.lock().unwrap().remove(&(fd, gsi)) {
            Some(own) => {
                // SAFETY: our own duplicate; closing it also takes it out of the epoll set.
                unsafe {
                    libc::epoll_ctl(self.epoll, libc::EPOLL_CTL_DEL, own, std::ptr::null_mut());
                    libc::close(own);
                }
                true
            }
            None => false,
        }
    }
    fn run(&self, vm: &Weak<Vm>) {
        loop {
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
            // SAFETY: a valid buffer of 16 events.
            let n = unsafe { libc::epoll_wait(self.epoll, events.as_mut_ptr(), 16, -1) };
            for e in &events[..n.max(0) as usize] {
                let data = e.u64;
                if data == u64::MAX {
                    return;
                }
                let mut count = 0u64;
                let own = (data >> 32) as i32;
                let live = self.fds.lock().unwrap().values().any(|&f| f == own);
                // SAFETY: reads 8 bytes into a local from a descriptor that epoll said is readable.
                if live && unsafe { libc::read(own, (&raw mut count).cast(), 8) } == 8 {
                    let Some(vm) = vm.upgrade() else { return };
                    vm.irq.edge_or_queue(&vm, data as u32);
                }
            }
        }
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        // SAFETY: our own descriptors.
        unsafe {
            for own in self.fds.lock().unwrap().values() {
                libc::close(*own);
            }
            libc::close(self.epoll);
            libc::close(self.stop);
        }
    }
}
