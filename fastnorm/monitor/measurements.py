"""What one step measures on the device: gradients, unless a clip has measured them, weights and updates."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from ..clip.health import dense
from ..clip.norms import measure
from ..clip.observers import Clip
from ..clip.policy_base import is_capturing
from .parameters import CurrentParameters, Replaced
from .rows import Piece, Shared

_GRAD = attrgetter("grad")


class _Told:
    """What a clip told. It holds for the step while its gradients are those of the parameters, unchanged since."""

    def __init__(self, clip: Clip, where: list[int]) -> None:
        self.where = where  # positions of the gradients among the parameters; −1: not among them
        norms, threshold = clip.norms, clip.threshold
        if norms is None or clip.norm_type != 2:
            norms = norms_of(clip.gradients)
        if not isinstance(threshold, Tensor):
            threshold = torch.full((), threshold, dtype=norms.dtype, device=norms.device)
        # Copies: a policy's threshold lies in its state, and the total norm is the caller's.
        self.total = Piece("total", clip.total_norm.clone())
        self.pieces = [
            Piece("norms", norms, where), Piece("coefficient", clip.coefficient), Piece("threshold", threshold.clone())
        ]  # fmt: skip
        self.gradients = [(position, id(g), _version(g)) for position, g in zip(where, clip.gradients, strict=True)
                          if position >= 0]  # fmt: skip
        first = next(i for i, position in enumerate(where) if position >= 0)
        self.first = TensorWeakRef(clip.gradients[first])  # without it another list might have the same ids

    def holds(self, gradients: list[Tensor | None]) -> bool:
        if self.first() is None:
            return False
        for position, identity, version in self.gradients:
            gradient = gradients[position]
            # The clip itself writes once, after it has told.
            if gradient is None or id(gradient) != identity or _version(gradient) > version + 1:
                return False
        return True


class Measurements:
    """Of a model's parameters. Nothing waits for the device. Gradients and weights are known by their positions."""

    def __init__(self, model: nn.Module) -> None:
        self.current = CurrentParameters(model)
        self.parameters = self.current.tensors
        self.ids = set(map(id, self.parameters))
        self.replaced: list[Replaced] = []  # for the monitor to look at
        self.is_due = True  # whether clips are listened to
        self.shared = Shared()
        self.forget()

    def forget(self) -> None:
        self.told: list[_Told] = []  # by clips since the last step
        self.weights: list[Tensor] | None = None  # copies of those before the step
        self.copied: list[int] = []  # their positions

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": set(), "told": [], "weights": None, "replaced": []}

    def follow(self) -> None:
        """Goes on with the parameters that the model has now."""
        replaced = self.current.follow()
        if replaced:
            self.replaced += replaced
            self.ids = set(map(id, self.parameters))
            self.weights = None  # the change is no update

    def clipping(self, clip: Clip) -> None:
        """Keeps what a clip tells, if it is of these parameters' gradients."""
        # Gradients of others are not looked at: another thread may be in their backward pass, which writes .grad
        # without the GIL.
        if not self.is_due:
            return
        self.follow()
        if self.ids.isdisjoint(map(id, clip.parameters)):
            return
        if is_capturing(clip.gradients[0].device):
            return
        positions = {id(g): i for i, g in enumerate(map(_GRAD, self.parameters)) if g is not None}
        where = [positions.get(id(gradient), -1) for gradient in clip.gradients]
        mine = {position for position in where if position >= 0}
        if mine:
            where = self.shared(where)
            self.told = [told for told in self.told if mine.isdisjoint(told.where)]
            self.told.append(_Told(clip, where))

    def read_gradients(self, optimizer: Optimizer | None) -> list[Piece]:
        """The norms that clips have told, and those of all other gradients, for which these are read."""
        gradients: list[Tensor | None] = list(map(_GRAD, self.parameters))
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        told = [told for told in self.told if told.holds(gradients)]
        pieces = [piece for clip in told for piece in clip.pieces]
        known = {position for clip in told for position in clip.where}
        rest = [i for i in present if i not in known] if known else present
        if len(told) == 1 and not rest:
            pieces.append(told[0].total)
        if rest:
            norms = norms_of([g for i in rest if (g := gradients[i]) is not None])
            pieces.append(Piece("norms", norms, self.shared(rest)))
        # Set by a deferred clip, or by a GradScaler whose gradients are still scaled.
        scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None and not told:
            pieces.append(Piece("scale", scale))
        if found_inf is not None:
            pieces.append(Piece("skipped", found_inf))
        return pieces

    def copy_weights(self) -> None:
        self.copied = [i for i, p in enumerate(self.parameters) if p.requires_grad]
        self.weights = [self.parameters[i].detach().clone() for i in self.copied]

    def measure_updates(self) -> list[Piece]:
        """Norms of the copied weights, and of what has changed since."""
        where = self.shared(self.copied)
        before, after = self.weights, [self.parameters[i] for i in where]
        if not before or list(map(_kind, before)) != list(map(_kind, after)):  # moved or cast since
            return []
        weights = norms_of(before)
        torch._foreach_sub_(before, after)
        return [Piece("weights", weights, where), Piece("updates", norms_of(before), where)]


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,): their L2 norms."""
    return measure([dense(tensor) for tensor in tensors], 2.0, float("inf")).norms


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _version(tensor: Tensor) -> int:
    """It grows with every write; tensors of inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version
