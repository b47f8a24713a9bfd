"""Names of modules as configurations of quantised checkpoints write them, and what they cover.

Owns the matching of such a name with the full names of a model's modules. A plain name covers the module of that name
and everything below it, wherever in the model it stands; `re:` begins a pattern for full names, from their start; what
is neither a plain name nor such a pattern is a pattern of that kind with anything above and below, or, where stars
stand for anything, a glob.

Files of older releases write `model.language_model` where a class has `language_model.model`, so that these words are
left out of the comparison where something else remains.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator

from kvoffload.errors import ConfigError

_WRAPPERS = {"model", "language_model", "text_model"}


class ModuleNames:
    """Some names, as a configuration lists them.

    Args:
        names: plain names and patterns.
        are_globs: whether a star stands for any text, also at the beginning.

    Raises:
        ConfigError: a pattern that is none; names it.
    """

    def __init__(self, names: Iterable[str], *, are_globs: bool = False) -> None:
        plain = {name: _unescaped(name) for name in names if name}
        self._plain = {one for one in plain.values() if _is_plain(one)}
        self._plain |= {shorter for one in self._plain if (shorter := _unwrapped(one))}
        self._patterns = [_pattern(name, are_globs) for name, one in plain.items() if not _is_plain(one)]

    def cover(self, full_names: Iterable[str]) -> bool:
        """Whether a module is among them, given everything it is called."""
        return any(
            not self._plain.isdisjoint(_within(name))
            or not self._plain.isdisjoint(_within(_unwrapped(name)))
            or any(pattern.match(name) for pattern in self._patterns)
            for name in full_names
        )


def _within(module: str) -> Iterator[str]:
    """The names of a module and of what it is in, and the ends of these: "a.b" gives "a", "a.b" and "b"."""
    parts = module.split(".")
    for first in range(len(parts)):
        for end in range(first + 1, len(parts) + 1):
            yield ".".join(parts[first:end])


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unescaped(name: str) -> str:
    return name if name.startswith("re:") else name.removesuffix("$").replace("\\.", ".")


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]*", name) is not None


def _pattern(name: str, is_glob: bool) -> re.Pattern[str]:
    """Of full names."""
    given = name.removeprefix("re:")
    if is_glob and given == name:
        return re.compile(fnmatch.translate(name))
    if given == name and name.startswith("*"):
        return re.compile(fnmatch.translate(f"{name}*"))
    try:
        return re.compile(given if given != name else rf"(?:.*\.)?(?:{name})(?:\.|$)")
    except re.error as error:
        raise ConfigError(f"{name!r} in the quantization_config is no pattern ({error}): correct it") from error
