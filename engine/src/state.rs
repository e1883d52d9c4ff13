//! A vCPU's state in the layouts of the kernel's UAPI (`struct kvm_regs` and so on, arch/x86/include/uapi/asm/kvm.h),
//! as bytes.

use crate::cpu::{CS, Cpu, DS, ES, Exception, FS, GS, SS, Seg, Table, Vcpu, cr0, cr4, efer, mp_state, shadow};
use crate::debug;
use crate::mmu;
use crate::smm;
use crate::vm::request;
use crate::xstate;

pub const REGS_BYTES: usize = 144;
pub const SREGS_BYTES: usize = 312;
pub const FPU_BYTES: usize = 416;
pub const XSAVE_BYTES: usize = 4096;
pub const EVENTS_BYTES: usize = 64;
pub const DEBUGREGS_BYTES: usize = 128;

/// Order of `kvm_regs`: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8–r15.
const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];

fn put(b: &mut [u8], at: usize, value: u64) {
    b[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
fn get(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

pub fn get_regs(v: &Vcpu) -> [u8; REGS_BYTES] {
    let mut b = [0; REGS_BYTES];
    for (n, &g) in ORDER.iter().enumerate() {
        put(&mut b, n * 8, v.cpu.gpr[g]);
    }
    put(&mut b, 128, v.cpu.rip);
    put(&mut b, 136, v.cpu.rflags());
    b
}

pub fn set_regs(v: &mut Vcpu, b: &[u8; REGS_BYTES]) {
    for (n, &g) in ORDER.iter().enumerate() {
        v.cpu.gpr[g] = get(b, n * 8);
    }
    v.cpu.rip = get(b, 128);
    v.cpu.set_rflags(get(b, 136));
    // What an earlier instruction was waiting for is not this one's.
    v.io = Default::default();
    v.injected = None;
    v.cpu.look_again();
}

fn put_segment(b: &mut [u8], s: &Seg) {
    put(b, 0, s.base);
    b[8..12].copy_from_slice(&s.limit.to_le_bytes());
    b[12..14].copy_from_slice(&s.sel.to_le_bytes());
    let bit = |n: u32| (s.attr >> n & 1) as u8;
    let fields = [s.attr as u8 & 15, bit(7), s.dpl(), bit(14), bit(4), bit(13), bit(15), bit(12), s.unusable as u8];
    b[14..23].copy_from_slice(&fields);
}

fn get_segment(b: &[u8]) -> Seg {
    let [kind, present, dpl, db, s, l, g, avl, unusable] = b[14..23].try_into().unwrap();
    let bit = |x: u8, n: u32| ((x & 1) as u16) << n;
    Seg {
        base: get(b, 0),
        limit: u32::from_le_bytes(b[8..12].try_into().unwrap()),
        sel: u16::from_le_bytes(b[12..14].try_into().unwrap()),
        attr: (kind & 15) as u16
            | bit(s, 4)
            | ((dpl & 3) as u16) << 5
            | bit(present, 7)
            | bit(avl, 12)
            | bit(l, 13)
            | bit(db, 14)
            | bit(g, 15),
        unusable: unusable != 0,
    }
}

pub fn get_sregs(v: &Vcpu) -> [u8; SREGS_BYTES] {
    let c = &*v.cpu;
    let mut b = [0; SREGS_BYTES];
    let segs = [&c.segs[CS], &c.segs[DS], &c.segs[ES], &c.segs[FS], &c.segs[GS], &c.segs[SS], &c.tr, &c.ldtr];
    for (n, s) in segs.iter().enumerate() {
        put_segment(&mut b[n * 24..], s);
    }
    for (n, t) in [&c.gdtr, &c.idtr].iter().enumerate() {
        put(&mut b, 192 + n * 16, t.base);
        b[200 + n * 16..202 + n * 16].copy_from_slice(&t.limit.to_le_bytes());
    }
    for (n, x) in [c.cr0, c.cr2, c.cr3, c.cr4, v.cr8(), c.efer, c.msr.apic_base].into_iter().enumerate() {
        put(&mut b, 224 + n * 8, x);
    }
    if let Some(vector) = v.user_irq {
        b[280 + vector as usize / 8] |= 1 << (vector & 7);
    }
    b
}

/// KVM_SET_SREGS; false for a combination that KVM refuses with EINVAL.
pub fn set_sregs(v: &mut Vcpu, b: &[u8; SREGS_BYTES]) -> bool {
    let reg = |n: usize| get(b, 224 + n * 8);
    let (c0, c2, c3, c4, c8, e, base) = (reg(0), reg(1), reg(2), reg(3), reg(4), reg(5), reg(6));
    let seg = |n: usize| get_segment(&b[n * 24..n * 24 + 24]);
    let long = e & efer::LME != 0 && c0 & cr0::PG != 0;
    if c0 >> 32 != 0
        || (c0 & cr0::PG != 0 && c0 & cr0::PE == 0)
        || (c0 & cr0::NW != 0 && c0 & cr0::CD == 0)
        || long && (c4 & cr4::PAE == 0 || e & efer::LMA == 0 || c3 >> mmu::PHYSICAL_BITS != 0)
        || !long && (e & efer::LMA != 0 || seg(0).long())
        || e & !(efer::SCE | efer::LME | efer::LMA | efer::NXE) != 0
        || c4 & (cr4::LA57 | cr4::PKE) != 0
        || c4 & cr4::PCIDE != 0 && !long
        || c4 >> 23 != 0
    {
        return false;
    }
    if base != v.cpu.msr.apic_base && v.write_apic_base(base, true).is_none() {
        return false;
    }
    let c: &mut Cpu = &mut v.cpu;
    for (n, at) in [(0, CS), (1, DS), (2, ES), (3, FS), (4, GS), (5, SS)] {
        c.segs[at] = seg(n);
    }
    (c.tr, c.ldtr) = (seg(6), seg(7));
    let table = |n: usize| Table {
        base: get(b, 192 + n * 16),
        limit: u16::from_le_bytes(b[200 + n * 16..202 + n * 16].try_into().unwrap()),
    };
    (c.gdtr, c.idtr) = (table(0), table(1));
    (c.cr0, c.cr2, c.cr3, c.cr4, c.efer) = (c0 | cr0::ET, c2, c3, c4, e);
    c.cpl = if c0 & cr0::PE == 0 { 0 } else { c.segs[SS].dpl() };
    v.set_cr8(c8 & 15);
    v.user_irq = (0..=255u8).find(|n| b[280 + *n as usize / 8] >> (n & 7) & 1 != 0);
    if c0 & cr0::PG != 0 && c4 & cr4::PAE != 0 && !long {
        mmu::load_pdptrs(v, c3);
    }
    mmu::flush_all(v);
    v.io = Default::default();
    v.cpu.look_again();
    true
}

pub fn get_fpu(v: &Vcpu) -> [u8; FPU_BYTES] {
    let f = &v.cpu.fpu.0;
    let mut b = [0; FPU_BYTES];
    b[..128].copy_from_slice(&f[32..160]);
    b[128..152].copy_from_slice(&f[0..24]);
    b[152..408].copy_from_slice(&f[160..416]);
    b[408..412].copy_from_slice(&f[24..28]);
    b
}

pub fn set_fpu(v: &mut Vcpu, b: &[u8; FPU_BYTES]) {
    let f = &mut v.cpu.fpu.0;
    f[32..160].copy_from_slice(&b[..128]);
    f[0..24].copy_from_slice(&b[128..152]);
    f[160..416].copy_from_slice(&b[152..408]);
    f[24..28].copy_from_slice(&b[408..412]);
    f[512] |= 3;
    v.cpu.fpu.sanitize();
}

pub fn get_xsave(v: &Vcpu) -> [u8; XSAVE_BYTES] {
    v.cpu.fpu.0
}

/// KVM_SET_XSAVE; false for components or MXCSR bits that do not exist.
pub fn set_xsave(v: &mut Vcpu, b: &[u8; XSAVE_BYTES]) -> bool {
    if get(b, 512) & !xstate::supported() != 0
        || get(b, 520) != 0
        || u32::from_le_bytes(b[24..28].try_into().unwrap()) & !0xffff != 0
    {
        return false;
    }
    v.cpu.fpu.0 = *b;
    v.cpu.fpu.sanitize();
    true
}

/// `kvm_vcpu_events`.
pub fn get_events(v: &mut Vcpu) -> [u8; EVENTS_BYTES] {
    let mut b = [0; EVENTS_BYTES];
    if let Some(e) = &mut v.injected {
        // Without KVM_CAP_EXCEPTION_PAYLOAD there is no place for the DR6 bits but DR6, and for the address but CR2.
        match e.vector {
            1 => debug::set_dr6(&mut v.cpu, std::mem::take(&mut e.payload)),
            14 => v.cpu.cr2 = e.payload,
            _ => {}
        }
        (b[0], b[1], b[2]) = (1, e.vector, e.error.is_some() as u8);
        b[4..8].copy_from_slice(&e.error.unwrap_or(0).to_le_bytes());
    }
    if let Some(vector) = v.user_irq {
        (b[8], b[9]) = (1, vector);
    }
    b[11] = v.cpu.shadow;
    b[13] = v.nmi_pending as u8;
    b[14] = v.nmi_masked as u8;
    // KVM_VCPUEVENT_VALID_NMI_PENDING | _SHADOW | _SMM
    b[20] = 1 | 4 | 8;
    for (n, x) in [v.smm, v.smi_pending, v.smm_inside_nmi, v.init_latched].into_iter().enumerate() {
        b[24 + n] = x.into();
    }
    b
}

/// KVM_SET_VCPU_EVENTS; false for an exception that does not exist.
pub fn set_events(v: &mut Vcpu, b: &[u8; EVENTS_BYTES]) -> bool {
    let vector = b[1];
    let exception = b[0] != 0 || b[3] != 0;
    if exception && (vector > 31 || vector == 2) {
        return false;
    }
    // KVM_VCPUEVENT_VALID_SMM
    let smi = (b[20] & 8 != 0).then(|| [b[24], b[25], b[26], b[27]].map(|x| x != 0));
    if let Some([smm, pending, ..]) = smi
        && (smm || pending)
        && v.mp_state == mp_state::INIT_RECEIVED
    {
        return false;
    }
    v.injected = exception.then(|| Exception {
        error: (b[2] != 0).then(|| u32::from_le_bytes(b[4..8].try_into().unwrap())),
        payload: if vector == 14 { v.cpu.cr2 } else { 0 },
        ..Exception::new(vector)
    });
    // What user space's chip has said to an APIC in the kernel is not part of the events.
    if b[8] != 0 || v.shared.lapic.is_none() {
        v.user_irq = (b[8] != 0).then_some(b[9]);
    }
    if b[20] & 4 != 0 {
        v.cpu.shadow = b[11] & (shadow::MOV_SS | shadow::STI);
    }
    if b[20] & 1 != 0 {
        v.nmi_pending = b[13] != 0;
    }
    v.nmi_masked = b[14] != 0;
    // KVM_VCPUEVENT_VALID_SIPI_VECTOR
    if b[20] & 2 != 0
        && let Some(lapic) = &v.shared.lapic
    {
        lapic.state.lock().unwrap().sipi_vector = b[16];
    }
    if let Some(smi) = smi {
        set_smm(v, smi);
    }
    v.shared.request(request::INTERRUPT);
    true
}

fn set_smm(v: &mut Vcpu, [smm, pending, inside_nmi, latched_init]: [bool; 4]) {
    // Not by leaving the mode: the new state says what waits.
    v.init_latched = false;
    if smm != v.smm {
        smm::switch(v, smm);
        if v.cpu.paging() && v.cpu.cr4 & cr4::PAE != 0 && v.cpu.efer & efer::LMA == 0 {
            // They were read from memory that isn't there in this mode.
            mmu::load_pdptrs(v, v.cpu.cr3);
        }
    }
    v.smi_pending = pending;
    v.smm_inside_nmi = smm && inside_nmi;
    if latched_init && v.shared.lapic.is_some() {
        v.init_latched = smm;
        if !smm {
            v.shared.request(request::INIT);
        }
    }
}

/// `kvm_debugregs`.
pub fn get_debugregs(v: &Vcpu) -> [u8; DEBUGREGS_BYTES] {
    let mut b = [0; DEBUGREGS_BYTES];
    for n in 0..4 {
        put(&mut b, n * 8, v.cpu.dr[n]);
    }
    put(&mut b, 32, v.cpu.dr[6]);
    put(&mut b, 40, v.cpu.dr[7]);
    b
}

pub fn set_debugregs(v: &mut Vcpu, b: &[u8; DEBUGREGS_BYTES]) -> bool {
    if get(b, 32) >> 32 != 0 || get(b, 40) >> 32 != 0 {
        return false;
    }
    for n in 0..4 {
        v.cpu.dr[n] = get(b, n * 8);
    }
    (v.cpu.dr[6], v.cpu.dr[7]) = (get(b, 32), get(b, 40));
    true
}
