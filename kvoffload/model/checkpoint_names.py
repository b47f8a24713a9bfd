"""What the modules of a model are called: in its class, and in the files of its checkpoints.

Owns the renamings that transformers applies when it loads a checkpoint, read backwards, so that a list of names in a
`quantization_config`, which was written for the files, is found in the class. Does not own the matching
(`module_names`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kvoffload.model.matrix import Weight

logger = logging.getLogger(__name__)
_PATTERN_SIGNS = set("*+?()[]^$\\|")


class CheckpointNames:
    """Everything that modules are called.

    Args:
        model: of transformers, on any device.
    """

    def __init__(self, model: Any) -> None:
        self._renamings: list[tuple[str, str]] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping

            for one in get_model_conversion_mapping(model):
                if type(one).__name__ == "WeightRenaming":
                    pairs = zip(one.source_patterns, one.target_patterns, strict=False)
                    self._renamings += [(old, new) for old, new in pairs if _PATTERN_SIGNS.isdisjoint(old + new)]
        except Exception as error:  # not there in this release, or not for this model
            logger.debug("no names in checkpoints of %s: %r", type(model).__name__, error)

    def __call__(self, one: Weight) -> Sequence[str]:
        """The full names of the module that a weight belongs to; of experts also as if each were a module."""
        dotted = f"{one.module}."
        names = [one.module]
        names += [dotted.replace(new, old).removesuffix(".") for old, new in self._renamings if new in dotted]
        if one.kind == "experts":
            names += [f"{name}.{more}{one.name}" for name in names for more in ("", "0.")]
        return names
