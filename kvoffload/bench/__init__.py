"""What is measured: decoding at named shapes, in every mode, beside the bound of the cost model."""

from kvoffload.bench.decode import measure, run, table
from kvoffload.bench.lab import FORM_MODES, MODES, WHOLE_LAYER_MODES, Lab, core_for_the_link, device_and_threads
from kvoffload.bench.presets import PRESETS, Preset

__all__ = [
    "FORM_MODES",
    "MODES",
    "PRESETS",
    "WHOLE_LAYER_MODES",
    "Lab",
    "Preset",
    "core_for_the_link",
    "device_and_threads",
    "measure",
    "run",
    "table",
]
