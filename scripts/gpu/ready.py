"""Whether this machine can be measured: nothing and exit code 0, or one line for each reason and 2."""

from __future__ import annotations

import importlib
import sys

from gpu.steps import NEEDED_BYTES

PACKAGES = ("torch", "transformers", "triton", "pulp", "highspy", "scipy", "typer", "rich")


def without_packages() -> list[str]:
    """What cannot be imported, in one line each."""
    reasons = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            why = str(error).splitlines()[0]
            reasons.append(f"the package {name} cannot be imported ({why}): install it, or its wheel with --wheels DIR")
    return reasons


def main() -> int:
    """Exit code: 0 where it can."""
    reasons = without_packages()
    if not reasons:
        import torch

        from kvoffload.profiler.readiness import problems

        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        reasons = problems(torch.device("cuda", index), needed_bytes=NEEDED_BYTES)
    for reason in reasons:
        print(f"gpu_suite: {reason}", file=sys.stderr)
    return 2 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
