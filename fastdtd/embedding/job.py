"""What passes between the process that asks for an embedded library and the one that compiles it."""

from __future__ import annotations

from dataclasses import dataclass

from fastdtd.embedding.targets import Target
from fastdtd.model import Model
from fastdtd.rules import Rules

OBJECT, WEIGHTS, COMPILED = "object", "weights", "compiled"  # files that it leaves


@dataclass(frozen=True)
class Job:
    """A library to compile."""

    model: Model
    rules: Rules
    target: Target
    name: str
    weights: str
    small: bool


@dataclass(frozen=True)
class Compiled:
    """What the header and the documentation say of a library."""

    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    inputs: dict[str, tuple[int, int, int]]  # of several, which lie one after the other
    classes: tuple[str, ...]
    workspace_bytes: int
    weights_bytes: int
    file_bytes: int  # of the weights file; 0 where they are inside
    reads_pictures: bool
    signed_scores: bool  # whether negative ones are explained
