"""What this machine offers, found out by a process of its own: a KVM that hangs or crashes takes nobody along."""

import json
import subprocess
import sys
from typing import Any

from kvmkit.errors import KvmkitError


def host_report(timeout_s: float = 60.0) -> dict[str, Any]:
    """Return `kvmkit.kvm.probe.Report` as plain data.

    Keys: `modules`, `nested`, `engines` (each `name`, `error`, `capabilities`, `supervisor_mips`), `choice`, `reason`.
    """
    command = [sys.executable, "-P", "-m", "kvmkit.vmm", "--probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise KvmkitError(f"probing this machine's KVM took longer than {timeout_s:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KvmkitError(f"probing this machine's KVM failed with status {done.returncode}: {last}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
