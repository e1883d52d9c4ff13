//! Random bytes through decoder and translator, and a look at the host code that comes out: whatever a guest's code is,
//! the memory that its translation touches is the vCPU's state, the code cache's table, or where a TLB probe led.
//!
//!     KVMKIT_CASES=300000 cargo test --release --no-default-features --test fuzz     from another KVMKIT_SEED
//!
//! Cases are blocks; with the careful path, each gives some 45 instructions. `bench/hostile.py` runs such code.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::classify::{Class, Features, classify};
use _engine::translate::{LinkIds, Mode, Translator};
use common::native::{Random, number};
use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register, UsedMemory};

struct Ids(u32);
impl LinkIds for Ids {
    fn next(&mut self, _: bool) -> u32 {
        self.0 += 1;
        self.0
    }
}

/// Bytes that are instructions more often than not.
fn random_code(r: &mut Random) -> Vec<u8> {
    const PREFIXES: [u8; 12] = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x64, 0x65, 0x40, 0x48, 0x4f];
    let mut out = Vec::with_capacity(400);
    while out.len() < 320 {
        for _ in 0..[0, 0, 0, 1, 1, 2][r.below(6) as usize] {
            out.push(PREFIXES[r.below(12) as usize]);
        }
        match r.below(8) {
            0..=2 => {}
            3 | 4 => out.push(0x0f),
            5 => out.extend([0x0f, if r.below(2) == 0 { 0x38 } else { 0x3a }]),
            6 => out.extend([0xc4, 0xe0 | (r.below(3) as u8 + 1), r.below(256) as u8]),
            _ => out.extend([0x62, 0xf0 | r.below(8) as u8, r.below(256) as u8 | 4, r.below(256) as u8]),
        }
        for _ in 0..r.below(8) {
            out.push(r.below(256) as u8);
        }
    }
    out
}

/// Is this where translated code may access memory?
fn is_allowed(m: &UsedMemory) -> bool {
    // Segments whose base the host has at 0, and whole addresses.
    if matches!(m.segment(), Register::FS | Register::GS) || m.address_size() != iced_x86::CodeSize::Code64 {
        return false;
    }
    match m.base() {
        // The vCPU's state, its tables of jumps and translations included.
        Register::RSP => true,
        // What a probe found (`emit::S0`).
        Register::RDI | Register::RSI => m.index() == Register::None,
        // The table of thunks.
        Register::RIP | Register::None => m.index() == Register::None,
        _ => false,
    }
}

fn check(host: &[u8], factory: &mut InstructionInfoFactory, guest: &[u8]) {
    for i in &mut Decoder::with_ip(64, host, 0x1000_0000, DecoderOptions::NONE) {
        assert!(!i.is_invalid(), "invalid host code for {guest:02x?}");
        for m in factory.info(&i).used_memory() {
            let touched = !matches!(m.access(), OpAccess::NoMemAccess | OpAccess::None);
            assert!(!touched || is_allowed(m), "{:?} {m:?} at {:#x} for {guest:02x?}", i.code(), i.ip());
        }
        assert!(!i.is_privileged(), "{:?} for {guest:02x?}", i.code());
    }
}

#[test]
fn translations_touch_what_they_may() {
    let mut r = Random(number("KVMKIT_SEED", 1));
    let cases = number("KVMKIT_CASES", 5000);
    let (mut translator, mut factory) = (Translator::new(), InstructionInfoFactory::new());
    let mut instructions = 0u64;
    for _ in 0..cases {
        let code = random_code(&mut r);
        let rip = r.next() & !0xfff | r.below(4096 - 320);
        let mode = Mode((r.below(32) << 2 | r.below(3)) as u8);
        let (host, block) = translator.translate(&code, rip, mode, 4096, &mut Ids(0));
        instructions += block.map.len() as u64;
        check(host, &mut factory, &code[..block.guest_len as usize]);
        // The careful path has translations of its own, of single instructions.
        for i in &mut Decoder::with_ip(64, &code, rip, DecoderOptions::NONE) {
            if !i.is_invalid() && matches!(classify(&i, Features::ALL), Class::Plain | Class::Careful) {
                let at = (i.ip() - rip) as usize;
                check(translator.translate_one(&i, 4096, false), &mut factory, &code[at..at + i.len()]);
                instructions += 1;
            }
        }
    }
    println!("{cases} blocks, {instructions} instructions");
    assert!(instructions > 10 * cases);
}
