"""Differential tests of whole machine states: one case on the software engine and on a reference.

`cases` makes a case of a seed, `code` the instructions in it; `run` runs it on a KVM, `on_unicorn` on Unicorn and `on_qemu` on QEMU; `compare` says
what differs, and `known` which differences are the reference's.
"""
