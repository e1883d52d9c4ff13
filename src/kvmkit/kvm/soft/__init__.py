"""The software KVM: the kernel's ``virt/kvm`` and ``arch/x86/kvm`` in user space, file for file.

`main` has the descriptors; `irqchip` and `x86` the chips. What runs for every guest instruction, access or interrupt is in
the native module `kvmkit._engine`.
"""
