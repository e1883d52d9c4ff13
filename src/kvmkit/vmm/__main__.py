"""``python -m kvmkit.vmm FD`` is a VM process; ``python -m kvmkit.vmm --probe`` prints what this machine offers as JSON."""

import json
import sys
from dataclasses import asdict


def _main(arguments: list[str]) -> int:
    if arguments == ["--probe"]:
        from kvmkit.kvm import probe

        print(json.dumps(asdict(probe.report())))
        return 0
    if len(arguments) == 1 and arguments[0].isdecimal():
        from kvmkit.vmm.process import main

        return main(int(arguments[0]))
    print("kvmkit.vmm is started by kvmkit.client: python -m kvmkit.vmm FD | --probe", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
