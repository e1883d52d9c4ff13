"""KVM for Python: the KVM interface, a software KVM, and a microVM monitor on either one."""

__version__ = "0.1.0"
