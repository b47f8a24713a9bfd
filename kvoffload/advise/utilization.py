"""Shares of a device's peaks that a decode step reaches.

MFU: operations of the model as a share of what the device's peak would do in that time. MBU: bytes of weights and cache
that a decode step cannot do without, as a share of what the memory's bandwidth would move in that time.
"""

from __future__ import annotations

import math

from kvoffload.advise.task import Task
from kvoffload.machine.hardware_profile import HardwareProfile


def decode_mfu(task: Task, batch: int, step_s: float) -> float:
    """Operations of a decode step of `batch` sequences over what the device's peak would do in `step_s`."""
    return task.step_flops(batch) / (peak_flops_per_s(task.profile) * step_s)


def decode_mbu(task: Task, batch: int, step_s: float) -> float:
    """Bytes that a decode step cannot do without over what the memory's bandwidth would move in `step_s`."""
    return task.step_bytes(batch) / (memory_bytes_per_s(task.profile) * step_s)


def peak_flops_per_s(profile: HardwareProfile) -> float:
    """The datasheet's, else the best measured."""
    known = profile.extra.get("peak_flops_per_s")
    return float(known or max(2 * math.prod(point.x) / point.seconds for point in profile.gemm.points))  # multiply-add


def memory_bytes_per_s(profile: HardwareProfile) -> float:
    """The datasheet's, else the best measured."""
    attended = [point.x[0] / point.seconds for point in profile.attention.points]
    return float(profile.extra.get("peak_bytes_per_s") or max(profile.device_copy_bytes_per_s, *attended))
