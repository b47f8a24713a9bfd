"""The process that the steps of tier 1 share: imports, the device's context and compiled kernels are paid for once.

Owns the beginning and the end of each step, and what is left between two. Tells both on a pipe, so that whoever started
it (`scripts/gpu_suite.py`) can end it in the middle of a step and start another one at the next.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from gpu import ready
from gpu.steps import Step, Suite, clock

NOT_READY, CONTEXT_LOST = 2, 3  # exit codes


def run(steps: Sequence[Step], results: Path, say: Callable[[dict[str, Any]], None]) -> None:
    """All steps, one after the other; what one of them raises is told and ends that one alone.

    Args:
        steps: in their order.
        results: the folder of rows.
        say: gets a message at the beginning and at the end of each step.

    Raises:
        SystemExit: the device's context is lost, as it is after an illegal access: a new process has to go on.
    """
    for step in steps:
        say({"begin": step.name})
        began_s, outcome = time.monotonic(), "ended well"
        try:
            step.run(Suite(results, clock(step.limit_s)))
        except Exception as error:  # whatever it is, the others have their turn
            traceback.print_exc()
            outcome = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        say({"end": step.name, "seconds": time.monotonic() - began_s, "outcome": outcome})
        tidy()


def tidy() -> None:
    """Give the device's memory back to the next step."""
    import torch

    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device cannot be used any more by this process: {error}", file=sys.stderr)
        raise SystemExit(CONTEXT_LOST) from error


def main(steps: Sequence[Step], results: Path, pipe: TextIO) -> None:
    """Run them, if the device can be measured.

    Raises:
        SystemExit: it cannot, or is lost.
    """

    def say(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    if ready.main():
        raise SystemExit(NOT_READY)
    run(steps, results, say)
