"""How the kernel's C declarations are written down in Python: typed struct fields and ioctl numbers.

A struct is a `ctypes.Structure` whose annotations are its fields, in order::

    @struct
    class kvm_msi(Structure):
        address_lo: u32
        pad: Annotated[Array[c_uint8], c_uint8 * 12]

so that a type checker knows the fields and the layout is stated once.
"""

import inspect
from ctypes import Structure, Union, c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from typing import Annotated, Any, TypeVar, get_args

u8 = Annotated[int, c_uint8]
u16 = Annotated[int, c_uint16]
u32 = Annotated[int, c_uint32]
u64 = Annotated[int, c_uint64]
s16 = Annotated[int, c_int16]
s32 = Annotated[int, c_int32]
s64 = Annotated[int, c_int64]

_T = TypeVar("_T", bound=type[Structure] | type[Union])


def struct(cls: _T) -> _T:
    """Give a ctypes struct or union the fields that its annotations name.

    An annotation is a ctypes class, `Annotated[type, ctype]`, or `Annotated[type, ctype, bits]` for a bit field. A class
    attribute `_anonymous_` names the members that C leaves nameless.
    """
    fields: list[Any] = []
    for name, annotation in inspect.get_annotations(cls).items():
        ctype = get_args(annotation)[1:] or (annotation,)
        fields.append((name, *ctype))
    cls._fields_ = fields
    return cls


def offset_of(cls: type[Structure], field: str) -> int:
    """Return C's ``offsetof(cls, field)``, in bytes."""
    return int(getattr(cls, field).offset)


KVMIO = 0xAE
"""The ioctl type of every KVM ioctl."""

_WRITE, _READ = 1, 2  # as user space sees it: it writes to, reads from the kernel


def _ioc(direction: int, nr: int, size_bytes: int) -> int:
    return direction << 30 | size_bytes << 16 | KVMIO << 8 | nr


def io(nr: int) -> int:
    """``_IO(KVMIO, nr)``: the argument is an integer or absent."""
    return _ioc(0, nr, 0)


def iow(nr: int, ctype: type[Any]) -> int:
    """``_IOW(KVMIO, nr, type)``: the kernel reads the struct."""
    return _ioc(_WRITE, nr, sizeof(ctype))


def ior(nr: int, ctype: type[Any]) -> int:
    """``_IOR(KVMIO, nr, type)``: the kernel fills in the struct."""
    return _ioc(_READ, nr, sizeof(ctype))


def iowr(nr: int, ctype: type[Any]) -> int:
    """``_IOWR(KVMIO, nr, type)``: both."""
    return _ioc(_READ | _WRITE, nr, sizeof(ctype))
