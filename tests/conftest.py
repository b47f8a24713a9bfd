"""What every test needs: one thread, no network, and no profile outside the test's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # of the terminal that tests run in: pytest-xdist sets it in its workers
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when triton is imported
torch.set_num_threads(1)  # tiny models are fastest so, and wall-clock tests steadiest


@pytest.fixture(scope="session", autouse=True)
def private_profile_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stored hardware profiles of the tests stay away from those of the machine."""
    folder = tmp_path_factory.mktemp("xdg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
