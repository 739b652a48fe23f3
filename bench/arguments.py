"""What command lines are made of: types of options that say what is wrong with a value."""

import itertools
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
from typing import Any

import torch

from . import memory
from .operation import Shape
from .presets import SHAPES


def name(known: Collection[str], kind: str) -> Callable[[str], str]:
    """A parser of one name."""

    def parse(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"unknown {kind} {text!r}; known: {', '.join(known)}")
        return text

    return parse


def several(one: Callable[[str], Any]) -> Callable[[str], tuple]:
    """A parser of values separated by commas."""
    return lambda text: tuple(dict.fromkeys(one(item.strip()) for item in text.split(",")))


def memory_state(text: str) -> str:
    """A state of memory.py, written as one word."""
    words = {state.replace(" ", "-"): state for state in memory.STATES}
    return words[name(words, "memory")(text)]


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A parser of numbers above zero."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a number") from None
        if not value > 0:
            raise ArgumentTypeError(f"{text!r} is not above zero")
        return value

    return parse


def device(text: str) -> torch.device:
    """A device that can be timed and is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ArgumentTypeError(f"{text!r} is no device of PyTorch's") from None
    if found.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"{text!r}: only cpu and cuda can be timed")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError(f"{text!r}: PyTorch sees no CUDA device here")
    return found


def shapes(text: str) -> tuple[Shape, ...]:
    """Shapes and names of presets, separated by commas."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(several(_shapes)(text))))


PATTERNS = "ROWSxCOLS, SAMPLESxROWSxCOLS, ROWSxCOLSxKVCOLS, NxCxHxW or SAMPLESxPOSITIONSxHEADSxKVHEADSxCOLS"


def _shapes(item: str) -> tuple[Shape, ...]:
    if item in SHAPES:
        return SHAPES[item]
    lengths = item.split("x")
    if not all(length.isdecimal() and int(length) for length in lengths):
        known = ", ".join(SHAPES)
        raise ArgumentTypeError(f"{item!r} is neither a shape, {PATTERNS}, nor one of {known}")
    return (tuple(map(int, lengths)),)
