"""The kernel's KVM user API: structs, ioctl numbers, exit reasons, capabilities, errors.

Names are those of ``<linux/kvm.h>`` and ``<asm/kvm.h>``. `common` holds what all architectures share, `x86` and `arm64` hold
the rest (`kvm_regs`, `kvm_run`, … exist in each). Nothing here imports anything of kvmkit outside this package.
"""
