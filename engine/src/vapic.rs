//! The task priority in guest memory (KVM_SET_VAPIC_ADDR): a word that a guest reads and writes instead of its local APIC's
//! TPR.
//!
//! Byte 0 is the TPR, byte 1 the class of the highest vector in service, byte 3 the highest vector requested
//! (`kvm_lapic_sync_to_vapic` in arch/x86/kvm/lapic.c). What the guest writes to byte 0 counts from its next exit on.

use crate::access;
use crate::cpu::Vcpu;
use crate::mem::READONLY;
use crate::smm;

const BYTES: usize = 4;

/// Have the word at `gpa`, or none if that is 0. False without a local APIC, or without memory there that can be written.
pub fn set(v: &mut Vcpu, gpa: u64) -> bool {
    let slots = v.vm.space(false).read().unwrap().clone();
    let there = |at: u64| slots.find(at).is_some_and(|s| s.flags & READONLY == 0);
    let valid = gpa == 0 || gpa.checked_add(BYTES as u64 - 1).is_some_and(|last| there(gpa) && there(last));
    if v.shared.lapic.is_none() || !valid {
        return false;
    }
    v.vapic = gpa;
    true
}

/// Write the word, as it is now.
pub fn show(v: &mut Vcpu) {
    if v.vapic == 0 {
        return;
    }
    let shared = v.shared.clone();
    let Some(lapic) = &shared.lapic else { return };
    let (tpr, in_service, requested) = lapic.state.lock().unwrap().priorities();
    let word = [tpr, in_service & 0xf0, 0, requested];
    let (first, second) = word.split_at(in_first_page(v.vapic));
    for (part, at) in [(first, v.vapic), (second, v.vapic + first.len() as u64)] {
        // Memory that has gone, as by a change of the slots, shows nothing.
        let _ = smm::outside(v, |v| access::write_memory(v, at, part));
    }
}

/// Take up the TPR that the guest has written.
pub fn take(v: &mut Vcpu) {
    let mut tpr = [0];
    let at = v.vapic;
    if at == 0 || smm::outside(v, |v| access::read_memory(v, at, &mut tpr)) != Ok(true) {
        return;
    }
    let changed = v.shared.lapic.as_ref().is_some_and(|l| l.state.lock().unwrap().set_tpr(tpr[0]));
    if changed {
        v.cpu.look_again();
    }
}

/// Bytes of the word that lie before the end of its first page.
fn in_first_page(gpa: u64) -> usize {
    BYTES.min(4096 - (gpa & 0xfff) as usize)
}
