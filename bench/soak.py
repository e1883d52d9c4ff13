"""Differential soak: generated code by the engine against this machine's processor, cases by the million.

Each case is straight code of any copied instruction, code whose operands partly fault, code that changes itself, or code
that is single-stepped; `engine/tests/differential.rs` says how they are made and compared. A difference is printed with its
seed and the listing; `--seed N --cases 1` shows it again. Needs cargo.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ENGINE = Path(__file__).resolve().parent.parent / "engine"


def main() -> int:
    """Run it; the exit status is 0 if there was no difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1_000_000, help="how many (default 1000000)")
    parser.add_argument("--seed", type=int, default=1, help="the first case's seed (default 1)")
    options = parser.parse_args()
    command = ["cargo", "test", "--release", "--no-default-features", "--test", "differential"]
    environment = os.environ | {"KVMKIT_CASES": str(options.cases), "KVMKIT_SEED": str(options.seed)}
    done = subprocess.run([*command, "--", "--ignored", "--nocapture", "soak"], cwd=ENGINE, env=environment)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
