"""Whether the GPU of this machine can be measured: nothing and exit code 0, or one line for each reason and 2."""

from __future__ import annotations

import sys

import torch
from gpu.steps import NEEDED_BYTES

from kvoffload.profiler.readiness import problems


def main() -> int:
    """Exit code: 0 where it can."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    reasons = problems(torch.device("cuda", index), needed_bytes=NEEDED_BYTES)
    for reason in reasons:
        print(f"gpu_suite: {reason}", file=sys.stderr)
    return 2 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
