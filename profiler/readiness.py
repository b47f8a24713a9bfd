"""Whether a GPU can be measured at all, and what to do where it cannot: one line each, before any minute is spent.

Owns four questions: does PyTorch reach the device, can the kernels run on it, is its memory free, can host memory be
pinned. Does not own the facts (`environment`) and measures nothing.
"""

from __future__ import annotations

import resource
import warnings
from collections.abc import Iterator

import torch

from kvoffload.backend import CudaBackend
from kvoffload.profiler import environment
from kvoffload.units import gb, gib

LEAST_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16 in the matrix units
PROBE_BYTES = 2**26


def problems(device: torch.device, *, needed_bytes: int) -> list[str]:
    """What stands in the way of measuring on a GPU, the most basic first; empty where nothing does.

    Args:
        device: a CUDA device.
        needed_bytes: device memory that must be free.
    """
    without_cuda = why_no_cuda()
    return [without_cuda] if without_cuda else list(_of_the_device(device, needed_bytes))


def why_no_cuda() -> str | None:
    """Why PyTorch sees no CUDA device, and what to do; None where it sees one."""
    if torch.cuda.is_available():
        return None
    facts = environment.gpu_facts()
    name, driver = facts["gpu_name"], facts["driver_version"]
    if torch.version.cuda is None:
        found = f" for this {name}" if name else ""
        return f"torch {torch.__version__} was built without CUDA: install a build with CUDA{found}"
    if name is None:
        return "no CUDA device: `nvidia-smi` shows none; in a container, start it with the GPU (docker run --gpus all)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if "too old" in str(error):
            return (
                f"driver {driver} of this {name} is too old for CUDA {torch.version.cuda}, which torch "
                f"{torch.__version__} was built with: update the driver, or install a torch for an older CUDA"
            )
        return f"PyTorch cannot use this {name} (driver {driver}): {str(error).splitlines()[0]}"
    return f"PyTorch sees no CUDA device beside this {name} (driver {driver}): is CUDA_VISIBLE_DEVICES set to hide it?"


def _of_the_device(device: torch.device, needed_bytes: int) -> Iterator[str]:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        yield (
            f"{name} has compute capability {capability[0]}.{capability[1]}, without bfloat16: the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, an Ampere card or a newer one"
        )
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    if free + ours < needed_bytes:
        if total < needed_bytes:
            yield f"{name} has {gb(total)} of memory, {gb(needed_bytes)} are needed: take a larger card"
        else:
            yield (
                f"other processes hold {gb(total - free - ours)} of the {gb(total)} of {name}, {gb(needed_bytes)} must "
                "be free: end them (`nvidia-smi` lists them), or choose another card with CUDA_VISIBLE_DEVICES"
            )
    if not _can_pin(device):
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "no limit is set" if soft == resource.RLIM_INFINITY else f"`ulimit -l` allows {gib(soft)}"
        yield (
            f"host memory cannot be locked for {name} ({limit}): raise it with `ulimit -l unlimited` or in "
            "/etc/security/limits.conf; in a container, start it with --ulimit memlock=-1"
        )


def _can_pin(device: torch.device) -> bool:
    backend = CudaBackend(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the way out is told by the caller
            return backend.allocate_host(PROBE_BYTES).pinned_bytes > 0
    finally:
        backend.close()
