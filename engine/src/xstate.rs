//! The components of XSAVE-managed state (Intel SDM volume 1, chapter 13): which ones the engine keeps, and where
//! they stand in an XSAVE area.
//!
//! `Cpu::fpu` has the standard format with the host's offsets, since the host's own XRSTOR and XSAVE work on it at
//! every entry to translated code; guests are told the same offsets.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

pub const X87: u64 = 1;
pub const SSE: u64 = 2;
pub const AVX: u64 = 4;
pub const OPMASK: u64 = 1 << 5;
pub const ZMM_HI256: u64 = 1 << 6;
pub const HI16_ZMM: u64 = 1 << 7;
/// Only ever enabled together.
pub const AVX512: u64 = OPMASK | ZMM_HI256 | HI16_ZMM;

/// Where the header stands: XSTATE_BV, XCOMP_BV.
pub const HEADER: usize = 512;
/// Where the extended components begin in the compacted format.
pub const EXTENDED: usize = 576;

/// A component behind the legacy region.
#[derive(Clone, Copy, Debug, Default)]
pub struct Component {
    /// Its bit in XCR0.
    pub bit: u64,
    /// Offset in the standard format.
    pub offset: usize,
    pub size: usize,
    /// On a 64-byte boundary in the compacted format.
    pub aligned: bool,
}

struct Layout {
    components: Vec<Component>,
    supported: u64,
}

fn layout() -> &'static Layout {
    static LAYOUT: OnceLock<Layout> = OnceLock::new();
    LAYOUT.get_or_init(|| {
        // SAFETY: XGETBV exists, as AVX does: the engine needs both (`thunks`).
        let host = if __cpuid(1).ecx >> 27 & 1 != 0 { unsafe { _xgetbv(0) } } else { X87 | SSE };
        let mut supported = host & (X87 | SSE | AVX);
        // BW and VL bring along what the thunks use; without them (Xeon Phi) there is no AVX-512 for guests.
        let leaf7 = __cpuid_count(7, 0).ebx;
        if host & AVX512 == AVX512 && leaf7 >> 16 & 1 != 0 && leaf7 >> 30 & 3 == 3 {
            supported |= AVX512;
        }
        let components = (2..8)
            .filter(|n| supported >> n & 1 != 0)
            .map(|n| {
                let r = __cpuid_count(0xd, n);
                let (offset, size) = (r.ebx as usize, r.eax as usize);
                assert!(offset + size <= 4096, "XSAVE component {n} at {offset}");
                Component { bit: 1 << n, offset, size, aligned: r.ecx >> 1 & 1 != 0 }
            })
            .collect();
        Layout { components, supported }
    })
}

/// The extended components that exist, lowest bit first.
pub fn components() -> &'static [Component] {
    &layout().components
}

/// XCR0 bits that exist.
pub fn supported() -> u64 {
    layout().supported
}

/// May XCR0 be `value`, where `offered` bits are?
pub fn valid_xcr0(value: u64, offered: u64) -> bool {
    value & X87 != 0
        && value & !(offered & supported()) == 0
        && (value & AVX == 0 || value & SSE != 0)
        && (value & AVX512 == 0 || value & (AVX512 | AVX) == AVX512 | AVX)
}

/// Offset of the component `bit` in the standard format.
pub fn offset(bit: u64) -> usize {
    components().iter().find(|c| c.bit == bit).map_or(0, |c| c.offset)
}

/// Bytes of a standard-format area for the components of `xcr0`.
pub fn standard_bytes(xcr0: u64) -> usize {
    components().iter().filter(|c| xcr0 & c.bit != 0).map(|c| c.offset + c.size).max().unwrap_or(EXTENDED)
}

/// The extended components of `mask` with their offsets in the compacted format, and the area's size.
pub fn compacted(mask: u64) -> (Vec<(Component, usize)>, usize) {
    let mut at = EXTENDED;
    let mut list = Vec::new();
    for c in components().iter().filter(|c| mask & c.bit != 0) {
        if c.aligned {
            at = at.next_multiple_of(64);
        }
        list.push((*c, at));
        at += c.size;
    }
    (list, at)
}
