"""The x86 part of the software KVM (``arch/x86/kvm``)."""
