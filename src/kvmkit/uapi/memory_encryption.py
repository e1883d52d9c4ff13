"""Sub-commands of KVM_MEMORY_ENCRYPT_OP (``<asm/kvm.h>`` on x86): AMD's SEV, Linux 6.12, and Intel's TDX, Linux 6.18.

They need processors and firmware of their own; a KVM that offers them says so by KVM_CAP_VM_TYPES.
"""

from ctypes import Array, Structure, c_uint8, c_uint32, c_uint64
from typing import Annotated

from kvmkit.uapi.layout import struct, u8, u16, u32, u64
from kvmkit.uapi.x86 import kvm_cpuid2

# kvm_sev_cmd.id
KVM_SEV_INIT = 0
KVM_SEV_ES_INIT = 1
KVM_SEV_LAUNCH_START = 2
KVM_SEV_LAUNCH_UPDATE_DATA = 3
KVM_SEV_LAUNCH_UPDATE_VMSA = 4
KVM_SEV_LAUNCH_SECRET = 5
KVM_SEV_LAUNCH_MEASURE = 6
KVM_SEV_LAUNCH_FINISH = 7
KVM_SEV_SEND_START = 8
KVM_SEV_SEND_UPDATE_DATA = 9
KVM_SEV_SEND_UPDATE_VMSA = 10
KVM_SEV_SEND_FINISH = 11
KVM_SEV_RECEIVE_START = 12
KVM_SEV_RECEIVE_UPDATE_DATA = 13
KVM_SEV_RECEIVE_UPDATE_VMSA = 14
KVM_SEV_RECEIVE_FINISH = 15
KVM_SEV_GUEST_STATUS = 16
KVM_SEV_DBG_DECRYPT = 17
KVM_SEV_DBG_ENCRYPT = 18
KVM_SEV_CERT_EXPORT = 19
KVM_SEV_GET_ATTESTATION_REPORT = 20
KVM_SEV_SEND_CANCEL = 21
KVM_SEV_INIT2 = 22
KVM_SEV_SNP_LAUNCH_START = 100
KVM_SEV_SNP_LAUNCH_UPDATE = 101
KVM_SEV_SNP_LAUNCH_FINISH = 102


@struct
class kvm_sev_cmd(Structure):
    """A command for SEV: `data` is the address of its struct; the firmware's error comes back in `error`."""

    id: u32
    pad0: u32
    data: u64
    error: u32
    sev_fd: u32


@struct
class kvm_sev_init(Structure):
    """KVM_SEV_INIT2."""

    vmsa_features: u64
    flags: u32
    ghcb_version: u16
    pad1: u16
    pad2: Annotated[Array[c_uint32], c_uint32 * 8]


@struct
class kvm_sev_launch_start(Structure):
    """KVM_SEV_LAUNCH_START."""

    handle: u32
    policy: u32
    dh_uaddr: u64
    dh_len: u32
    pad0: u32
    session_uaddr: u64
    session_len: u32
    pad1: u32


@struct
class kvm_sev_launch_update_data(Structure):
    """KVM_SEV_LAUNCH_UPDATE_DATA."""

    uaddr: u64
    len: u32
    pad0: u32


@struct
class kvm_sev_launch_secret(Structure):
    """KVM_SEV_LAUNCH_SECRET."""

    hdr_uaddr: u64
    hdr_len: u32
    pad0: u32
    guest_uaddr: u64
    guest_len: u32
    pad1: u32
    trans_uaddr: u64
    trans_len: u32
    pad2: u32


@struct
class kvm_sev_launch_measure(Structure):
    """KVM_SEV_LAUNCH_MEASURE."""

    uaddr: u64
    len: u32
    pad0: u32


@struct
class kvm_sev_guest_status(Structure):
    """KVM_SEV_GUEST_STATUS."""

    handle: u32
    policy: u32
    state: u32


@struct
class kvm_sev_dbg(Structure):
    """KVM_SEV_DBG_DECRYPT and KVM_SEV_DBG_ENCRYPT."""

    src_uaddr: u64
    dst_uaddr: u64
    len: u32
    pad0: u32


@struct
class kvm_sev_attestation_report(Structure):
    """KVM_SEV_GET_ATTESTATION_REPORT."""

    mnonce: Annotated[Array[c_uint8], c_uint8 * 16]
    uaddr: u64
    len: u32
    pad0: u32


@struct
class kvm_sev_send_start(Structure):
    """KVM_SEV_SEND_START."""

    policy: u32
    pad0: u32
    pdh_cert_uaddr: u64
    pdh_cert_len: u32
    pad1: u32
    plat_certs_uaddr: u64
    plat_certs_len: u32
    pad2: u32
    amd_certs_uaddr: u64
    amd_certs_len: u32
    pad3: u32
    session_uaddr: u64
    session_len: u32
    pad4: u32


@struct
class kvm_sev_send_update_data(Structure):
    """KVM_SEV_SEND_UPDATE_DATA and KVM_SEV_SEND_UPDATE_VMSA."""

    hdr_uaddr: u64
    hdr_len: u32
    pad0: u32
    guest_uaddr: u64
    guest_len: u32
    pad1: u32
    trans_uaddr: u64
    trans_len: u32
    pad2: u32


@struct
class kvm_sev_receive_start(Structure):
    """KVM_SEV_RECEIVE_START."""

    handle: u32
    policy: u32
    pdh_uaddr: u64
    pdh_len: u32
    pad0: u32
    session_uaddr: u64
    session_len: u32
    pad1: u32


@struct
class kvm_sev_receive_update_data(Structure):
    """KVM_SEV_RECEIVE_UPDATE_DATA and KVM_SEV_RECEIVE_UPDATE_VMSA."""

    hdr_uaddr: u64
    hdr_len: u32
    pad0: u32
    guest_uaddr: u64
    guest_len: u32
    pad1: u32
    trans_uaddr: u64
    trans_len: u32
    pad2: u32


@struct
class kvm_sev_snp_launch_start(Structure):
    """KVM_SEV_SNP_LAUNCH_START."""

    policy: u64
    gosvw: Annotated[Array[c_uint8], c_uint8 * 16]
    flags: u16
    pad0: Annotated[Array[c_uint8], c_uint8 * 6]
    pad1: Annotated[Array[c_uint64], c_uint64 * 4]


KVM_SEV_SNP_PAGE_TYPE_NORMAL = 0x1
KVM_SEV_SNP_PAGE_TYPE_ZERO = 0x3
KVM_SEV_SNP_PAGE_TYPE_UNMEASURED = 0x4
KVM_SEV_SNP_PAGE_TYPE_SECRETS = 0x5
KVM_SEV_SNP_PAGE_TYPE_CPUID = 0x6


@struct
class kvm_sev_snp_launch_update(Structure):
    """KVM_SEV_SNP_LAUNCH_UPDATE."""

    gfn_start: u64
    uaddr: u64
    len: u64
    type: u8
    pad0: u8
    flags: u16
    pad1: u32
    pad2: Annotated[Array[c_uint64], c_uint64 * 4]


KVM_SEV_SNP_ID_BLOCK_SIZE = 96
KVM_SEV_SNP_ID_AUTH_SIZE = 4096
KVM_SEV_SNP_FINISH_DATA_SIZE = 32


@struct
class kvm_sev_snp_launch_finish(Structure):
    """KVM_SEV_SNP_LAUNCH_FINISH."""

    id_block_uaddr: u64
    id_auth_uaddr: u64
    id_block_en: u8
    auth_key_en: u8
    vcek_disabled: u8
    host_data: Annotated[Array[c_uint8], c_uint8 * KVM_SEV_SNP_FINISH_DATA_SIZE]
    pad0: Annotated[Array[c_uint8], c_uint8 * 3]
    flags: u16
    pad1: Annotated[Array[c_uint64], c_uint64 * 4]


# kvm_tdx_cmd.id
KVM_TDX_CAPABILITIES = 0
KVM_TDX_INIT_VM = 1
KVM_TDX_INIT_VCPU = 2
KVM_TDX_INIT_MEM_REGION = 3
KVM_TDX_FINALIZE_VM = 4
KVM_TDX_GET_CPUID = 5


@struct
class kvm_tdx_cmd(Structure):
    """A command for TDX: `data` is the address of its struct; the module's error comes back in `hw_error`."""

    id: u32
    flags: u32
    data: u64
    hw_error: u64


@struct
class kvm_tdx_capabilities(Structure):
    """The head of KVM_TDX_CAPABILITIES; entries of `cpuid` follow."""

    supported_attrs: u64
    supported_xfam: u64
    kernel_tdvmcallinfo_1_r11: u64
    user_tdvmcallinfo_1_r11: u64
    kernel_tdvmcallinfo_1_r12: u64
    user_tdvmcallinfo_1_r12: u64
    reserved: Annotated[Array[c_uint64], c_uint64 * 250]
    cpuid: kvm_cpuid2


@struct
class kvm_tdx_init_vm(Structure):
    """The head of KVM_TDX_INIT_VM; entries of `cpuid` follow."""

    attributes: u64
    xfam: u64
    mrconfigid: Annotated[Array[c_uint64], c_uint64 * 6]
    mrowner: Annotated[Array[c_uint64], c_uint64 * 6]
    mrownerconfig: Annotated[Array[c_uint64], c_uint64 * 6]
    reserved: Annotated[Array[c_uint64], c_uint64 * 12]
    cpuid: kvm_cpuid2


KVM_TDX_MEASURE_MEMORY_REGION = 1 << 0


@struct
class kvm_tdx_init_mem_region(Structure):
    """KVM_TDX_INIT_MEM_REGION."""

    source_addr: u64
    gpa: u64
    nr_pages: u64
