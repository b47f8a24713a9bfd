"""Weight matrices in plain numbers: one parameter of a model, and what is alike in all layers of its decoder."""

from __future__ import annotations

from typing import Literal, NamedTuple

# "mixer": what stands in place of attention in a layer that keeps a state (linear attention, Mamba and the like)
Part = Literal["attention", "mixer", "mlp", "experts", "head"]
# "matrix": multiplied with by a module that is no linear layer; "other": not multiplied with tokens
Kind = Literal["linear", "experts", "matrix", "embedding", "head", "other"]


class Weight(NamedTuple):
    """One parameter of two dimensions or more."""

    module: str  # full name of the module it belongs to
    name: str  # in that module
    kind: Kind
    inputs: int
    outputs: int
    copies: int = 1  # experts
    has_bias: bool = False

    @property
    def num_values(self) -> int:
        """Without biases."""
        return self.inputs * self.outputs * self.copies


class Matrix(NamedTuple):
    """One weight matrix that activations are multiplied with, of every layer that has it."""

    name: str
    part: Part
    inputs: int
    outputs: int
    layers: int  # how many layers have it
    stored: int = 1  # copies per layer: experts
    active: int = 1  # of these, how many one token goes through
    bias: bool = False
    bits: float = 16.0  # of each weight as it is stored, scales of quantised ones included; biases apart
    cached: int = 0  # of its outputs, how many go to the cache as they are or rotated
    expands: bool = False  # of latent attention: makes keys and values of what is cached

    @property
    def num_values(self) -> int:
        """All copies in all layers, without biases."""
        return self.layers * self.stored * self.inputs * self.outputs

    def read_copies(self, tokens: int) -> float:
        """Copies of one layer that a forward of so many tokens reads; experts as expected if all are as likely."""
        if self.stored == 1:
            return 1.0
        return self.stored * (1 - (1 - self.active / self.stored) ** tokens)  # those that a token is sent to

    def read_bytes(self, tokens: int) -> float:
        """Bytes of weights, as they are stored, that a forward of so many tokens reads in all layers."""
        return self.layers * self.read_copies(tokens) * self.inputs * self.outputs * self.bits / 8


class Group(NamedTuple):
    """A matrix, and the parameters it stands for."""

    matrix: Matrix
    weights: tuple[Weight, ...]
