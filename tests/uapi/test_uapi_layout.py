"""Every struct, ioctl number and constant in `kvmkit.uapi` against the kernel's headers, by a compiled program.

The installed ``<linux/kvm.h>`` is the first witness. Where a package ``linux-headers-*-common`` is unpacked (in /usr/src, or in
the directory that KVMKIT_KERNEL_HEADERS names) its newer headers are the second, and arm64's are checked as well: sizes
and offsets come out alike with any 64-bit little-endian compiler.
"""

import ctypes
import inspect
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvmkit.uapi import arm64, capabilities, common, memory_encryption, x86
from kvmkit.uapi.layout import offset_of

C_STRUCT_OF_MEMBER = {
    # kvm_run's exit union has nameless structs: (outer struct, member)
    getattr(module, f"kvm_run_{member}"): ("kvm_run", member)
    for module, members in (
        (common, "hw fail_entry ex io mmio hypercall tpr_access internal emulation_failure system_event eoi"),
        (common, "arm_nisv msr notify memory_fault tdx"),
        (common, "s390_sieic s390_ucontrol s390_tsch s390_stsi dcr osi papr_hcall epr"),
        (common, "riscv_sbi riscv_csr iocsr_io"),
        (x86, "debug"),
        (arm64, "debug"),
    )
    for member in members.split()
}
NOT_IN_C = {
    "kvm_run_exit",
    "kvm_ioapic_redirect_entry",
}  # names that C leaves out; checked through what holds them
NEWER_STRUCTS = {  # in the first release that has the struct, this macro appeared too
    "kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "kvm_memory_attributes": "KVM_SET_MEMORY_ATTRIBUTES",
    "kvm_create_guest_memfd": "KVM_CREATE_GUEST_MEMFD",
    "kvm_pre_fault_memory": "KVM_PRE_FAULT_MEMORY",
    "kvm_run_memory_fault": "KVM_EXIT_MEMORY_FAULT",
    "kvm_smccc_filter": "KVM_ARM_VM_SMCCC_FILTER",
    "kvm_arm_counter_offset": "KVM_ARM_SET_COUNTER_OFFSET",
    "reg_mask_range": "KVM_ARM_GET_REG_WRITABLE_MASKS",
    "kvm_run_tdx": "KVM_EXIT_TDX",
    "kvm_run_iocsr_io": "KVM_EXIT_LOONGARCH_IOCSR",
    "kvm_sev_init": "KVM_X86_SEV_VM",
    "kvm_sev_snp_launch_start": "KVM_X86_SNP_VM",
    "kvm_sev_snp_launch_update": "KVM_X86_SNP_VM",
    "kvm_sev_snp_launch_finish": "KVM_X86_SNP_VM",
    "kvm_xen_hvm_attr": "KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA",
    "kvm_xen_vcpu_attr": "KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA",
    "kvm_tdx_cmd": "KVM_X86_TDX_VM",
    "kvm_tdx_capabilities": "KVM_X86_TDX_VM",
    "kvm_tdx_init_vm": "KVM_X86_TDX_VM",
    "kvm_tdx_init_mem_region": "KVM_X86_TDX_VM",
}
NEWER_MEMBERS = {  # in struct kvm_run
    "memory_fault": "KVM_EXIT_MEMORY_FAULT",
    "tdx": "KVM_EXIT_TDX",
    "iocsr_io": "KVM_EXIT_LOONGARCH_IOCSR",
    "riscv_csr": "KVM_EXIT_RISCV_CSR",
}
# What Linux 6.12, of which Debian has headers, doesn't have: held against the documented layout below.
NEWER_THAN_HEADERS = {
    "KVM_CAP_ARM_WRITABLE_IMP_ID_REGS",
    "KVM_CAP_ARM_EL2",
    "KVM_CAP_ARM_EL2_E2H0",
    "KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED",
    "KVM_CAP_GUEST_MEMFD_FLAGS",
    "KVM_EXIT_TDX",
    "KVM_SYSTEM_EVENT_TDX_FATAL",
    "KVM_X86_TDX_VM",
    "KVM_TDX_MEASURE_MEMORY_REGION",
}
ENUMS = {
    "KVM_SEV_": "KVM_X86_SNP_VM",
    "KVM_TDX_": "KVM_X86_TDX_VM",
}  # no macros; these came with their last ones
# Members of kvm_run that the oldest headers spell otherwise.
SKIPPED_MEMBERS = {("kvm_run_hypercall", "flags")}


def header_trees() -> list[Path]:
    """Unpacked kernel header packages."""
    named = os.environ.get("KVMKIT_KERNEL_HEADERS")
    return [Path(named)] if named else sorted(Path("/usr/src").glob("linux-headers-*-common"))


def structs(module: ModuleType) -> Iterator[tuple[str, type[ctypes.Structure] | type[ctypes.Union]]]:
    """Public struct classes that `module` itself defines."""
    for name, value in vars(module).items():
        if not (inspect.isclass(value) and issubclass(value, (ctypes.Structure, ctypes.Union))):
            continue
        if value.__module__ == module.__name__ and not name.startswith("_") and name not in NOT_IN_C:
            yield name, value


def constants(module: ModuleType) -> dict[str, int]:
    """Public integer constants that have a C macro of the same name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int)
        and name.isupper()
        and name.startswith(("KVM_", "MSR_", "SYNC_"))
        or name.endswith("_VECTOR")
    }


def members(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Path in C, offset and size in bytes of each member of `cls`, nested helper structs spelled out."""
    anonymous = getattr(cls, "_anonymous_", ())
    for name, ctype, *bits in cls._fields_:
        if bits or name.startswith("_"):
            continue
        descriptor = getattr(cls, name)
        if name not in anonymous:
            yield prefix + name, descriptor.offset, ctypes.sizeof(ctype)
        if inspect.isclass(ctype) and hasattr(ctype, "_fields_"):
            path = prefix if name in anonymous else f"{prefix}{name}."
            for inner, offset, size in members(ctype, path):
                yield inner, descriptor.offset + offset, size


def claims(modules: list[ModuleType]) -> dict[str, int]:
    """C expression → the value that Python holds it to have."""
    found: dict[str, int] = {}
    for module in modules:
        for name, cls in structs(module):
            outer, member = C_STRUCT_OF_MEMBER.get(cls, (name, ""))
            start = f"((struct {outer} *)0)"
            whole = f"{start}->{member}" if member else f"struct {name}"
            found[f"{name}|sizeof({whole})"] = ctypes.sizeof(cls)
            for path, offset, size in members(cls):
                if (name, path) in SKIPPED_MEMBERS or (
                    name == "kvm_run" and path.startswith("hypercall.flags")
                ):
                    continue
                inside = f"{member}.{path}" if member else path
                base = f" - offsetof(struct {outer}, {member})" if member else ""
                found[f"{name}|offsetof(struct {outer}, {inside}){base}"] = offset
                found[f"{name}|sizeof({start}->{inside})"] = size
        for name, value in constants(module).items():
            found[f"#{name}"] = value
    return found


def measure(directory: Path, expressions: list[str], flags: list[str]) -> dict[str, int | None]:
    """Compile and run a program that prints each expression; None for a macro that isn't defined."""
    lines = []
    for number, expression in enumerate(expressions):
        if expression.startswith("#"):
            text = expression[1:]
            guard = next((macro for prefix, macro in ENUMS.items() if text.startswith(prefix)), text)
        else:
            struct, text = expression.split("|", 1)
            guard = NEWER_STRUCTS.get(struct, "KVM_API_VERSION")
            if struct in ("kvm_run", "kvm_run_exit"):
                guard = next(
                    (macro for name, macro in NEWER_MEMBERS.items() if re.search(rf"\b{name}\b", text)), guard
                )
        lines.append(f'#ifdef {guard}\n    printf("{number} %llu\\n", (unsigned long long)({text}));\n#endif')
    source = directory / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        "#ifdef __x86_64__\n#include <asm/kvm_para.h>\n#endif\n"
        "int main(void)\n{\n" + "\n".join(lines) + "\n    return 0;\n}\n"
    )
    program = directory / "layout"
    compiled = subprocess.run(
        ["cc", "-w", *flags, "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    values = {int(number): int(value) for number, value in (line.split() for line in output.splitlines())}
    return {expression: values.get(number) for number, expression in enumerate(expressions)}


def compare(directory: Path, modules: list[ModuleType], flags: list[str]) -> set[str]:
    """Assert that C and Python agree; returns what these headers don't have."""
    expected = claims(modules)
    measured = measure(directory, list(expected), flags)
    wrong = {
        expression: (value, measured[expression])
        for expression, value in expected.items()
        if measured[expression] not in (value & (1 << 64) - 1, None)
    }
    assert not wrong, "Python's value, C's value"
    return {expression for expression, value in measured.items() if value is None}


def is_newer(expression: str) -> bool:
    """Whether an expression is of what Linux 6.12 doesn't have."""
    if expression.startswith("#"):
        return expression[1:] in NEWER_THAN_HEADERS or expression.startswith("#KVM_TDX_")
    struct, text = expression.split("|", 1)
    return NEWER_STRUCTS.get(struct) in NEWER_THAN_HEADERS or "tdx" in text


@pytest.fixture(autouse=True)
def compiler() -> None:
    """Skip without a C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")


def tree_flags(directory: Path, tree: Path, arch: str) -> list[str]:
    """Flags to compile with the UAPI headers of a kernel header package, which are not yet cleaned for user space."""
    stub = directory / "stub" / "linux"
    stub.mkdir(parents=True)
    for name in ("compiler.h", "compiler_types.h"):
        (stub / name).touch()
    return [
        "-D__user=",
        *(f"-I{path}" for path in (stub.parent, tree / f"arch/{arch}/include/uapi", tree / "include/uapi")),
    ]


def test_x86_against_installed_headers(tmp_path: Path) -> None:
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no <linux/kvm.h>")
    if os.uname().machine != "x86_64":
        pytest.skip("the installed headers are another architecture's")
    missing = compare(tmp_path, [common, x86, capabilities], [])  # SEV has named its padding since
    # The oldest headers that we meet are 6.1's; whatever they lack must be known to be newer.
    newer = {
        "KVM_CAP_",
        "KVM_EXIT_MEMORY_FAULT",
        "KVM_MEM",
        "KVM_SET_USER_MEMORY_REGION2",
        "KVM_CREATE_GUEST_MEMFD",
    }
    newer |= {"KVM_SET_MEMORY_ATTRIBUTES", "KVM_PRE_FAULT_MEMORY", "KVM_RUN_X86_GUEST_MODE"}
    newer |= {
        "KVM_EXIT_LOONGARCH",
        "KVM_EXIT_TDX",
        "KVM_EXIT_HYPERCALL_LONG_MODE",
        "KVM_SYSTEM_EVENT_TDX",
        "KVM_DEV_VFIO",
    }
    newer |= {"KVM_X86_", "KVM_XEN_", "KVM_PMU_EVENT_FLAG"}
    assert not {name for name in missing if name[0] == "#" and not name[1:].startswith(tuple(newer))}


@pytest.mark.parametrize(("arch", "module"), [("x86", x86), ("arm64", arm64)])
def test_against_kernel_header_package(tmp_path: Path, arch: str, module: ModuleType) -> None:
    trees = header_trees()
    if not trees:
        pytest.skip(
            f"no linux-headers-*-common in /usr/src: {arch} isn't checked against the kernel's newest headers"
        )
    modules = [common, module, capabilities] + [memory_encryption] * (arch == "x86")
    missing = compare(tmp_path, modules, tree_flags(tmp_path, trees[-1], arch))
    if arch == "arm64":  # macros of x86 alone
        x86_only = "KVM_CAP_", "KVM_COALESCED", "KVM_EXIT_"
        missing = {name for name in missing if not name[1:].startswith(x86_only)}
    assert not {expression for expression in missing if not is_newer(expression)}


def test_what_is_newer_than_the_headers() -> None:
    """Layouts of Documentation/virt/kvm/api.rst (KVM_EXIT_TDX) and x86/intel-tdx.rst, counted by hand."""
    assert ctypes.sizeof(common.kvm_run_tdx) == 64
    tdx = dict((path, offset) for path, offset, _ in members(common.kvm_run_tdx))
    assert (tdx["flags"], tdx["nr"], tdx["unknown.ret"], tdx["unknown.data"]) == (0, 8, 16, 24)
    assert (tdx["get_quote.ret"], tdx["get_quote.gpa"], tdx["get_quote.size"]) == (16, 24, 32)
    assert (tdx["get_tdvmcall_info.leaf"], tdx["get_tdvmcall_info.r14"]) == (24, 56)
    assert tdx["setup_event_notify.vector"] == 24
    assert ctypes.sizeof(memory_encryption.kvm_tdx_cmd) == 24
    assert offset_of(memory_encryption.kvm_tdx_cmd, "hw_error") == 16
    assert offset_of(memory_encryption.kvm_tdx_capabilities, "cpuid") == 2048
    assert offset_of(memory_encryption.kvm_tdx_init_vm, "cpuid") == 256
    assert ctypes.sizeof(memory_encryption.kvm_tdx_init_mem_region) == 24
    assert {capabilities.CAPABILITIES[name] for name in NEWER_THAN_HEADERS if name.startswith("KVM_CAP")} == {
        239,
        240,
        241,
        243,
        244,
    }


def test_the_check_sees_a_wrong_layout(tmp_path: Path) -> None:
    """The program really measures, and says what it doesn't know."""
    right = {
        "kvm_msi|sizeof(struct kvm_msi)": 32,
        "kvm_msi|offsetof(struct kvm_msi, devid)": 16,
        "#KVM_API_VERSION": 12,
    }
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no <linux/kvm.h>")
    assert measure(tmp_path, [*right, "#KVM_NO_SUCH_NAME"], []) == {**right, "#KVM_NO_SUCH_NAME": None}
