"""What is made of a tensor, made once for as long as the tensor lives.

A view takes the host microseconds to make, and every step needs those of the same few buffers again. Keeps no memory
alive: an entry goes with its tensor, which must be a view itself, since a view holds on to the tensor it is of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Derived(Generic[T]):
    """Calls `make` once for each tensor, by identity.

    Args:
        make: returns views of the tensor it is given.
    """

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[torch.Tensor], T]) -> None:
        self._make = make
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], T]] = {}

    def of(self, tensor: torch.Tensor) -> T:
        """What `make` returned for this tensor."""
        key = id(tensor)
        found = self._made.get(key)
        if found is not None and found[0]() is tensor:
            return found[1]
        with torch.inference_mode(False):  # else the views could not be written outside of inference mode
            made = self._make(tensor)
        if tensor._is_view():  # else its views would keep it
            entries = self._made  # not self: an entry must not keep the one who made it
            entries[key] = (weakref.ref(tensor, lambda _: entries.pop(key, None) and None), made)
        return made
