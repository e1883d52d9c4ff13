//! From interrupt lines, messages and eventfds to local APICs, without the GIL.
//!
//! The PIC and the IOAPIC are Python (`kvmkit/kvm/soft/x86`). What they decide is compiled into a table: for each
//! GSI, the messages that an edge on it sends. An edge on a GSI whose table entry is complete is delivered
//! here at once; any other is queued for Python (`take_lines`), which is woken by an eventfd.

use crate::eventfd::{EventFd, IoEvent, IrqFds};
use crate::lapic::{self, Message};
use crate::vm::Vm;
use std::collections::HashMap;
use std::io::{Error, Result};
use std::sync::{Arc, Mutex, RwLock};

/// What an edge on a GSI does.
#[derive(Clone, Debug, Default)]
pub struct Route {
    pub messages: Vec<Message>,
    /// The PIC, a level-triggered or a masked pin takes part: Python must see the edge.
    pub python: bool,
}

#[derive(Default)]
pub struct Irq {
    /// Replaced as a whole: an edge that comes meanwhile finds the old table or the new.
    routes: RwLock<HashMap<u32, Route>>,
    events: RwLock<Vec<IoEvent>>,
    /// Edges for Python to look at.
    lines: Mutex<Vec<u32>>,
    irqfds: Mutex<Option<IrqFds>>,
    /// Tells Python to call `take_lines`.
    wake: Mutex<Option<EventFd>>,
}

impl Irq {
    pub fn set_routes(&self, routes: HashMap<u32, Route>) {
        *self.routes.write().unwrap() = routes;
    }
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
    /// Vectors that an edge on `gsi` raises.
    pub fn vectors(&self, gsi: u32) -> Vec<u8> {
        let routes = self.routes.read().unwrap();
        routes.get(&gsi).map_or(Vec::new(), |r| r.messages.iter().map(|m| m.vector).collect())
    }
    /// An edge from a thread that has no Python: what it cannot deliver waits for `take_lines`.
    pub fn edge_or_queue(&self, vm: &Vm, gsi: u32) {
        if !self.edge(vm, gsi) {
            self.lines.lock().unwrap().push(gsi);
            if let Some(fd) = &*self.wake.lock().unwrap() {
                fd.signal();
            }
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
            if e.matches(pio, address, data.len(), value) {
                e.fd.signal();
                hit = true;
            }
        }
        hit
    }
    pub fn set_wake(&self, fd: Option<EventFd>) {
        *self.wake.lock().unwrap() = fd;
    }
    /// EBUSY: `fd` raises a GSI already.
    pub fn add_irqfd(&self, vm: &Arc<Vm>, fd: EventFd, gsi: u32) -> Result<()> {
        let mut irqfds = self.irqfds.lock().unwrap();
        if irqfds.is_none() {
            *irqfds = Some(IrqFds::start(vm)?);
        }
        irqfds.as_ref().expect("just started").assign(fd, gsi)
    }
    pub fn remove_irqfd(&self, fd: &EventFd, gsi: u32) -> bool {
        self.irqfds.lock().unwrap().as_ref().is_some_and(|i| i.deassign(fd, gsi))
    }
    /// EEXIST: a write would be for another one too.
    pub fn add_ioeventfd(&self, event: IoEvent) -> Result<()> {
        let mut events = self.events.write().unwrap();
        if events.iter().any(|e| e.collides(&event)) {
            return Err(Error::from_raw_os_error(libc::EEXIST));
        }
        events.push(event);
        Ok(())
    }
    /// ENOENT: there is none like `event`.
    pub fn remove_ioeventfd(&self, event: &IoEvent) -> Result<()> {
        let mut events = self.events.write().unwrap();
        let n = events.iter().position(|e| e.same(event)).ok_or(Error::from_raw_os_error(libc::ENOENT))?;
        events.remove(n);
        Ok(())
    }
    /// The VM is closed: no more eventfds.
    pub fn close(&self) {
        // Taken out first: its thread, which this waits for, may be delivering an edge.
        let irqfds = self.irqfds.lock().unwrap().take();
        drop(irqfds);
        self.events.write().unwrap().clear();
        self.set_wake(None);
    }
}
