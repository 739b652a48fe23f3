"""Rows of measurements: made on the device, copied to the host without waiting, decoded there.

The device only measures and concatenates. Whose norm stands where, and all that follows from the norms, is left to the
host, which knows without asking the device which parameters have a gradient.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Numbers of one kind, on the device. where: what they belong to, by position. Of inputs also, sizes: how many
    elements; factors and offsets: the sum of their squares is factor · number² − offset."""

    kind: str
    values: Tensor
    where: Sequence[int] = ()
    sizes: Sequence[int] = ()
    offsets: Sequence[float] = ()
    factors: Sequence[float] = ()


class Part(NamedTuple):
    """What the host keeps of a Piece whose numbers are on their way. length: how many numbers."""

    kind: str
    length: int
    where: Sequence[int]
    sizes: Sequence[int]
    offsets: Sequence[float]
    factors: Sequence[float]


class Shared:
    """Gives an equal list that other rows have already: a thousand rows shall not have a thousand lists."""

    def __init__(self) -> None:
        self.known: list[list[Any]] = []  # the newest first

    def __call__(self, numbers: list[Any]) -> list[Any]:
        for known in self.known:
            if known == numbers:
                return known
        self.known = [numbers, *self.known[:7]]
        return numbers


@dataclass
class Row:
    """One recorded step. values: the parts' numbers in order, once they are on the host."""

    step: int
    parts: list[Part]
    values: Tensor
    spike: float | None = None  # how many times the median the total norm is, where that is a spike

    @classmethod
    def of(cls, step: int, pieces: Sequence[Piece]) -> Row:
        """Reads and copies the pieces' numbers, to the first of their devices that is no CPU."""
        parts = [Part(p.kind, p.values.numel(), *p[2:]) for p in pieces]
        flat = [piece.values.reshape(-1) for piece in pieces]
        return cls(step, parts, concatenated(flat) if flat else torch.empty(0, device="cpu"))

    def of_kind(self, kind: str) -> list[tuple[Tensor, Part]]:
        """The parts of one kind, with their numbers in float64."""
        found, start = [], 0
        for part in self.parts:
            if part.kind == kind:
                found.append((self.values[start : start + part.length].double(), part))
            start += part.length
        return found

    def placed(self, kind: str, count: int) -> tuple[Tensor, Tensor]:
        """(count,): the numbers of one kind, each at its position, and where there is one."""
        numbers, is_there = (torch.zeros(count, dtype=dtype, device="cpu") for dtype in (torch.float64, torch.bool))
        for values, part in self.of_kind(kind):
            put(numbers, part.where, values)
            put(is_there, part.where, torch.ones_like(values, dtype=torch.bool))
        return numbers, is_there

    def number(self, kind: str) -> float:
        """The smallest of all numbers of one kind, NaN if one is; NaN without any."""
        found = [values for values, _ in self.of_kind(kind)]
        return torch.cat(found).min().item() if found else math.nan

    def total_norm(self) -> float:
        """The clip's own total norm, if one clip measured all gradients; else the L2 norm of all of them."""
        total = self.of_kind("total")
        if total:
            return total[0][0].item()
        found = [v if -1 not in part.where else v[torch.tensor(part.where) >= 0] for v, part in self.of_kind("norms")]
        norm = torch.linalg.vector_norm(torch.cat(found)) if found else torch.zeros((), device="cpu")
        for scale, _ in self.of_kind("scale"):
            norm = norm / scale
        return norm.item()

    def norms(self, parameters: int) -> tuple[Tensor, Tensor]:
        """(parameters,): the L2 norms of the gradients, and whether there is one."""
        norms, present = self.placed("norms", parameters)
        for scale, _ in self.of_kind("scale"):
            norms /= scale
        return norms, present


def put(target: Tensor, where: Sequence[int], values: Tensor) -> None:
    """target[where] = values. Positions of −1 are left out."""
    positions = torch.tensor(where, dtype=torch.long, device="cpu")
    wanted = positions >= 0
    target[positions[wanted]] = values[wanted]


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    return torch.cat([t.to(device, non_blocking=True) for t in tensors])


class Transfer:
    """Brings rows to the host, in order. From a GPU, several go in one copy to pinned memory."""

    def __init__(self, flush_every: int) -> None:
        self.flush_every = flush_every
        self.staged: list[Row] = []
        self.in_flight: deque[tuple[Any, Tensor, list[Row]]] = deque()  # what tells that the copy is done, the copy

    def put(self, row: Row) -> None:
        self.staged.append(row)
        if len(self.staged) >= self.flush_every or row.values.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Starts the copy of the rows that are still on the device."""
        if self.staged:
            done, host = start_copy(concatenated([row.values for row in self.staged]))
            self.in_flight.append((done, host, self.staged))
            self.staged = []

    def next(self, wait: bool) -> Row | None:
        """The next row that has arrived. wait: for the device, until all started copies are done."""
        while self.in_flight:
            done, host, rows = self.in_flight[0]
            if done is not None:
                if not wait and not done.query():
                    return None
                done.synchronize()
                self.in_flight[0] = None, host.clone(), rows  # pinned memory is for copies
            elif rows:
                row = rows.pop(0)
                count = sum(part.length for part in row.parts)
                self.in_flight[0] = None, host[count:], rows
                row.values = host[:count]
                return row
            else:
                self.in_flight.popleft()
        return None


def start_copy(values: Tensor) -> tuple[Any, Tensor]:
    """Starts a copy to the host. Returns an event that tells its end, None if it has ended, and the copy."""
    if values.device.type != "cuda":
        return None, values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.Event(device=values.device)
    done.record()
    return done, host
