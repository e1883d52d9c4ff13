//! Counters: what they count, and the layout of the file that shows them.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::Exit;
use _engine::stats::{Counter, vcpu, vm};
use common::*;
use std::os::unix::fs::FileExt;

fn count(m: &Machine, counter: Counter) -> u64 {
    m.v.shared.stats.get(counter)
}

#[test]
fn events_are_counted() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    // mov eax, [0x20000]; mov [0x20000], eax; cpuid; out 0x80, al; hlt
    let code = [0x8b, 0x04, 0x25, 0, 0, 2, 0, 0x89, 0x04, 0x25, 0, 0, 2, 0, 0x0f, 0xa2, 0xe6, 0x80, 0xf4];
    assert!(matches!(m.run(&code), Exit::Io { .. }));
    assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
    let expected = [
        (vcpu::EXITS, 2),
        (vcpu::IO_EXITS, 1),
        (vcpu::HALT_EXITS, 1),
        (vcpu::READ_MISSES, 1),
        (vcpu::WRITE_MISSES, 1),
        (vcpu::MEMORY, 2),
        (vcpu::INTERPRETED, 3),
        (vcpu::EXCEPTIONS, 0),
        (vcpu::ENTRIES, 2),
    ];
    for (counter, n) in expected {
        assert_eq!(count(&m, counter), n, "{counter:?}");
    }
    assert_eq!(m.v.vm.stats.get(vm::TRANSLATED), 2);
    assert!(m.v.vm.stats.get(vm::CACHE_BYTES) > 0 && m.v.vm.stats.get(vm::TRANSLATION_TIME) > 0);
    // A page fault; an instruction that nothing here has (VMCALL).
    assert_eq!(m.run(&[0x8b, 0x04, 0x25, 0, 0, 0, 0x70]), Exit::Hlt);
    assert_eq!((count(&m, vcpu::PAGE_FAULTS), count(&m, vcpu::SLOW)), (1, 1));
    assert_eq!(m.run(&[0x0f, 0x01, 0xc1]), Exit::Hlt);
    assert_eq!((m.halted_in(), count(&m, vcpu::UNSUPPORTED)), (Some(6), 1));
    let unsupported = m.v.vm.unsupported.lock().unwrap();
    assert_eq!(unsupported[&iced_x86::Mnemonic::Vmcall], 1);
}

#[test]
fn a_loop_of_pause_gives_the_processor_away() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    // pause; hlt
    assert_eq!(m.run(&[0xf3, 0x90, 0xf4]), Exit::Hlt);
    assert_eq!(count(&m, vcpu::SPIN_YIELDS), 0);
    // mov ecx, 100000; 1: pause; dec ecx; jnz 1b; hlt
    assert_eq!(m.run(&[0xb9, 0xa0, 0x86, 1, 0, 0xf3, 0x90, 0xff, 0xc9, 0x75, 0xfa, 0xf4]), Exit::Hlt);
    assert!(count(&m, vcpu::SPIN_YIELDS) > 0);
}

#[test]
fn the_file_has_the_layout_of_binary_statistics() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    let file = std::fs::File::from(m.v.shared.stats.open().unwrap());
    let word = |at: u64| {
        let mut b = [0; 4];
        file.read_exact_at(&mut b, at).unwrap();
        u32::from_le_bytes(b) as u64
    };
    let text = |at: u64| {
        let mut b = [0; 48];
        file.read_exact_at(&mut b, at).unwrap();
        String::from_utf8(b.iter().copied().take_while(|&c| c != 0).collect()).unwrap()
    };
    let (name_size, count, id, descriptors, data) = (word(4), word(8), word(12), word(16), word(20));
    assert_eq!(text(id), format!("kvm-{}/vcpu-0", std::process::id()));
    let value = |name: &str| {
        let at = (0..count).map(|n| descriptors + n * (16 + name_size)).find(|&at| text(at + 16) == name).unwrap();
        let mut b = [0; 8];
        file.read_exact_at(&mut b, data + word(at + 8)).unwrap();
        (word(at), u64::from_le_bytes(b))
    };
    assert_eq!(value("exits"), (0, 0));
    assert_eq!(m.run(&[0xf4]), Exit::Hlt);
    assert_eq!((value("exits"), value("halt_exits")), ((0, 1), (0, 1)), "live");
    // A histogram of nanoseconds: the values behind one another, 2^10 to 2^11 in bucket 11.
    m.v.shared.stats.observe(vcpu::HALT_WAIT_HIST, 1500);
    let at =
        (0..count).map(|n| descriptors + n * (16 + name_size)).find(|&at| text(at + 16) == "halt_wait_hist").unwrap();
    let mut b = [0; 8];
    file.read_exact_at(&mut b, data + word(at + 8) + 11 * 8).unwrap();
    assert_eq!((word(at), u64::from_le_bytes(b)), (0x24, 1));
    assert_eq!(word(at + 4), 0xfff7 | 32 << 16, "10^-9, 32 values");
    assert!(file.write_at(&[0], 0).is_err(), "for reading alone");
}
