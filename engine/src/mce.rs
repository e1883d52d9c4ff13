//! Machine checks (Intel SDM volume 3, chapter 16): the banks that user space fills by KVM_X86_SET_MCE, and the guest
//! reads. Nothing here detects an error itself.

use crate::cpu::{Exception, Vcpu, cr4};
use crate::msr::Refused;

const MAX_BANKS: usize = 32;
const MACHINE_CHECK: u8 = 18;

/// IA32_MCG_CAP: IA32_MCG_CTL is there.
const CTL_P: u64 = 1 << 8;
/// IA32_MCG_CAP: software may recover from errors.
const SER_P: u64 = 1 << 24;
/// What KVM_X86_SETUP_MCE may ask for beside the number of banks, and of extended registers (bits 16 to 23).
pub const SUPPORTED: u64 = CTL_P | SER_P;

/// IA32_MCG_STATUS: a machine check is being handled.
const IN_PROGRESS: u64 = 1 << 2;

/// IA32_MCi_STATUS.
mod status {
    pub const VALID: u64 = 1 << 63;
    pub const OVERFLOW: u64 = 1 << 62;
    pub const UNCORRECTED: u64 = 1 << 61;
    pub const CONTEXT_CORRUPT: u64 = 1 << 57;
    pub const SIGNALED: u64 = 1 << 56;
    pub const ACTION_REQUIRED: u64 = 1 << 55;
}

/// A bank's registers, in the order of their MSRs.
#[derive(Clone, Copy, Default)]
struct Bank {
    ctl: u64,
    status: u64,
    addr: u64,
    misc: u64,
}

pub struct Mce {
    cap: u64,
    ctl: u64,
    status: u64,
    banks: [Bank; MAX_BANKS],
}

impl Default for Mce {
    fn default() -> Self {
        Self { cap: MAX_BANKS as u64, ctl: 0, status: 0, banks: [Bank::default(); MAX_BANKS] }
    }
}

/// `struct kvm_x86_mce`.
pub struct Error {
    pub status: u64,
    pub addr: u64,
    pub misc: u64,
    pub mcg_status: u64,
    pub bank: u8,
}

impl Error {
    /// Uncorrected, but no action required: it is only recorded.
    fn no_action(&self) -> bool {
        use status::*;
        self.mcg_status == 0
            && self.status & (VALID | UNCORRECTED) == VALID | UNCORRECTED
            && self.status & (CONTEXT_CORRUPT | SIGNALED | ACTION_REQUIRED) == 0
    }
}

impl Mce {
    fn banks(&self) -> usize {
        self.cap as usize & 0xff
    }

    /// The bank and which of its four registers an MSR is.
    fn place(&self, index: u32) -> Option<(usize, usize)> {
        let n = index.checked_sub(0x400)? as usize;
        (n < self.banks() * 4).then_some((n / 4, n % 4))
    }

    /// KVM_X86_SETUP_MCE; false for what isn't offered.
    pub fn setup(&mut self, cap: u64) -> bool {
        let banks = cap as usize & 0xff;
        if banks == 0 || banks > MAX_BANKS || cap & !(SUPPORTED | 0xff_00ff) != 0 {
            return false;
        }
        self.cap = cap;
        if cap & CTL_P != 0 {
            self.ctl = u64::MAX;
        }
        self.banks[..banks].iter_mut().for_each(|bank| bank.ctl = u64::MAX);
        true
    }

    pub fn read(&self, index: u32, host: bool) -> Result<u64, Refused> {
        Ok(match index {
            0x179 => self.cap,
            0x17a => self.status,
            0x17b if self.cap & CTL_P != 0 || host => self.ctl,
            _ => {
                let (bank, register) = self.place(index).ok_or(Refused::Invalid)?;
                let Bank { ctl, status, addr, misc } = self.banks[bank];
                [ctl, status, addr, misc][register]
            }
        })
    }

    pub fn write(&mut self, index: u32, value: u64, host: bool) -> Result<(), Refused> {
        match index {
            0x179 if host => {}
            0x17a => self.status = value,
            0x17b if (self.cap & CTL_P != 0 || host && value == 0) && matches!(value, 0 | u64::MAX) => self.ctl = value,
            _ => {
                let (bank, register) = self.place(index).ok_or(Refused::Invalid)?;
                let b = &mut self.banks[bank];
                match register {
                    // Linux clears bits 0 and 10 of some, for the sake of old processors.
                    0 if value == 0 || value | 1 << 10 | 1 == u64::MAX => b.ctl = value,
                    1 if value == 0 || host => b.status = value,
                    2 => b.addr = value,
                    3 => b.misc = value,
                    _ => return Err(Refused::Invalid),
                }
            }
        }
        Ok(())
    }
}

/// KVM_X86_SET_MCE; false if there is no such bank or no error.
pub fn set(v: &mut Vcpu, error: &Error) -> bool {
    let mce = &mut v.mce;
    if error.bank as usize >= mce.banks() || error.status & status::VALID == 0 {
        return false;
    }
    let bank = &mut mce.banks[error.bank as usize];
    let record = |bank: &mut Bank, status: u64| {
        *bank = Bank { ctl: bank.ctl, status, addr: error.addr, misc: error.misc };
    };
    let overflow = if bank.status & status::VALID != 0 { status::OVERFLOW } else { 0 };
    if error.no_action() {
        record(bank, error.status);
        mce.status = error.mcg_status;
    } else if error.status & status::UNCORRECTED != 0 {
        // What isn't enabled isn't reported.
        if mce.cap & CTL_P != 0 && mce.ctl != u64::MAX || bank.ctl != u64::MAX {
            return true;
        }
        if mce.status & IN_PROGRESS != 0 || v.cpu.cr4 & cr4::MCE == 0 {
            v.triple_fault = true;
        } else {
            record(bank, error.status | overflow);
            mce.status = error.mcg_status;
            v.injected = Some(Exception::new(MACHINE_CHECK));
        }
        v.cpu.look_again();
    } else if overflow != 0 && bank.status & status::UNCORRECTED != 0 {
        // A corrected error doesn't replace an uncorrected one.
        bank.status |= status::OVERFLOW;
    } else {
        record(bank, error.status | overflow);
    }
    true
}
