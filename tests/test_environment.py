"""Facts of a machine: read where they are, None where they are not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvoffload.profiler import environment

SMI_ROW = "NVIDIA A100-PCIE-40GB, 550.54.15, 40960, 00000000:3B:00.0, 3, 4, 8, 16"
SYSFS = "/sys/bus/pci/devices/0000:3b:00.0/"


class FakeMachine:
    """Files by path, and what nvidia-smi prints; None: there is none."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.smi: str | None = None

    def read(self, path: Path) -> str | None:
        return self.files.get(str(path))

    def run(self, command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        if self.smi is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, stdout=self.smi, stderr="")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    fake = FakeMachine()
    monkeypatch.setattr(environment, "_read", fake.read)
    monkeypatch.setattr(environment.subprocess, "run", fake.run)
    return fake


def test_without_a_gpu_every_fact_about_it_is_none(machine: FakeMachine) -> None:
    assert environment.gpu_facts() == environment.NO_GPU
    assert set(environment.NO_GPU.values()) == {None}


def test_the_link_in_use_and_its_maximum_come_from_nvidia_smi(machine: FakeMachine) -> None:
    machine.smi = SMI_ROW
    machine.files[SYSFS + "numa_node"] = "1"
    facts = environment.gpu_facts()
    assert facts == {
        "gpu_name": "NVIDIA A100-PCIE-40GB",
        "driver_version": "550.54.15",
        "gpu_memory_bytes": 40960 * 2**20,
        "pcie_generation": 3,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "gpu_numa_node": 1,
    }


def test_what_nvidia_smi_does_not_know_comes_from_sysfs_or_stays_none(machine: FakeMachine) -> None:
    machine.smi = SMI_ROW.replace("3, 4, 8, 16", "[N/A], [N/A], [N/A], [N/A]")
    machine.files |= {
        SYSFS + "current_link_speed": "16.0 GT/s PCIe",
        SYSFS + "max_link_speed": "32.0 GT/s PCIe",
        SYSFS + "current_link_width": "8",
        SYSFS + "numa_node": "-1",
    }
    facts = environment.gpu_facts()
    assert (facts["pcie_generation"], facts["pcie_generation_max"]) == (4, 5)
    assert (facts["pcie_width"], facts["pcie_width_max"]) == (8, None)
    assert facts["gpu_numa_node"] is None


def test_a_failing_or_strange_nvidia_smi_is_no_gpu(machine: FakeMachine) -> None:
    machine.smi = "No devices were found"
    assert environment.gpu_facts() == environment.NO_GPU


def test_time_of_all_work_leaves_out_idling(machine: FakeMachine) -> None:
    machine.files["/proc/stat"] = "cpu  100 20 30 9000 800 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0"
    ticks_per_s = environment.os.sysconf("SC_CLK_TCK")
    assert environment.cpu_seconds()[0] == pytest.approx(165 / ticks_per_s)
    machine.files.clear()
    assert environment.cpu_seconds()[0] != environment.cpu_seconds()[0]  # nan: unknown


def test_the_environment_of_this_machine_is_complete_and_plain_data() -> None:
    facts = environment.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["memory_bytes"] > 2**20
    assert facts["num_cpus"] >= 1
    assert facts["versions"]["torch"]
    assert facts["locked_memory_is_unlimited"] == (facts["locked_memory_limit_bytes"] is None)
