"""A monitor of training that never waits for the device."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..clip import observers
from ..clip.activations import RELU_LIKE
from ..clip.health import check_bounds
from ..clip.policy_base import is_capturing
from . import plots, records, report
from .arguments import (
    check_count,
    check_kinds,
    check_numbers,
    check_path,
    check_string,
    check_writer,
    grouped,
    innermost,
)
from .measurements import Measurements
from .records import Names, Record, RunningMedian
from .rows import Piece, Row, Transfer
from .watch import ForwardWatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Monitor"]


class Monitor:
    """Records norms, clips and updates of a training run, and never waits for the device.

    Each step of the optimizer is a row. What it has, for each parameter or group of parameters:

    - `gradient_norm`: the L2 norm of the gradient, before clipping; `nonfinite`: how many gradients have a NaN or
      infinite norm.
    - `weight_norm` and `update_ratio`, |Δw| / |w| with w before the step: every `updates_every` steps. Such a step
      copies the weights that require gradients, for as long as the optimizer runs (a closure included), and reads
      weights and copy.

    For each of fastnorm's norms: `input_rms`, √mean(x²) over what the forward passes since the last step gave to it
    (x + residual, where it adds one). It follows from the mean and rstd that the norm computes for its backward: no
    input is read. That of a norm which computes none, such as a batch norm in evaluation, is read every `updates_every`
    steps. A forward pass without gradients, or compiled, isn't seen.

    For the step: `total_norm`, `coefficient` and `threshold` of the clip, whether it `clipped`, and whether it was
    `skipped` by `found_inf`, as a fused optimizer does for `clip_grad_norm_in_optimizer` and for a GradScaler. Every
    `updates_every` steps also, with `dead_neurons`, `zero_share`, the share of exact zeros after each ReLU-like module.

    `clip_grad_norm_` and `clip_grad_norm_in_optimizer` measure every norm: the monitor takes these, and reads no
    gradient. For `clip_grads_with_norm_` and for another norm_type than 2 it reads the gradients once, before they are
    scaled. Without such a clip it reads them when the optimizer steps: they are then as torch's own clip,
    `clip_grad_value_` or `adaptive_clip_grad_` left them. `patch_torch_clip` puts fastnorm's clip behind torch's name.

    Rows come to the host by non-blocking copies, `flush_every` rows in one. The methods that read wait for them. The
    host keeps `keep` rows. Nothing of this enters a state_dict: after a restart a new monitor begins anew, with
    `first_step` if the numbers are to go on.

    Make it after the model is on its device, sharded and wrapped. It records until `close()` or the end of a `with`
    block. Parameters that are replaced, as by load_state_dict(assign=True), are followed under their names, with a
    warning if the optimizer still has the old ones. Modules that are added later are not seen.

    Args:
        model: whose parameters, each once. Those that are frozen or have no gradient have no numbers.
        optimizer: a torch.optim.Optimizer of its parameters, or a wrapper of one whose `optimizer` it is. Without one,
            call `step()` in each iteration.
        every: records one of so many steps.
        keep: how many rows to keep.
        groups: maps parameters' names to groups' names: a dict, in which names may be missing, or a function. Norms of
            a group are of all its tensors together.
        updates_every: steps between two measurements of weights, updates, zeros, and inputs that must be read.
        flush_every: rows that a GPU collects before they are copied.
        dead_neurons: whether to count zeros, or after which classes of modules.
        spike_factor: a spike is a total norm above so many times the running median (of up to 100 norms, at least 10),
            or a NaN or infinite one.
        on_spike: called with the spike's row, as from `last()`, once it has arrived: on a CPU in the same step, on a
            GPU some steps later. What it raises comes out of the optimizer's step, after the update.
        first_step: the number of the first step.

    Raises:
        TypeError: for an argument of the wrong type, by name.
        ValueError: for one out of range, an optimizer of other parameters, a model without any.
        RuntimeError: at a step that is captured in a CUDA graph, which replays no hook. Make the monitor without the
            optimizer after the capture, and call `step()` after each replay.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        every: int = 1,
        keep: int = 1000,
        *,
        groups: Mapping[str, str] | Callable[[str], str] | None = None,
        updates_every: int = 50,
        flush_every: int = 10,
        dead_neurons: bool | tuple[type[nn.Module], ...] = False,
        spike_factor: float = 5.0,
        on_spike: Callable[[dict[str, Any]], object] | None = None,
        first_step: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
        counts = {"every": every, "keep": keep, "updates_every": updates_every, "flush_every": flush_every}
        for name, count in counts.items():
            check_count(name, count)
        check_count("first_step", first_step, least=0)
        if not isinstance(spike_factor, (int, float)):
            raise TypeError(f"spike_factor must be a number above 1, but got {type(spike_factor).__name__}")
        if not spike_factor > 1:
            raise ValueError(f"spike_factor must be a number above 1, but got {spike_factor!r}")
        if on_spike is not None and not callable(on_spike):
            raise TypeError(f"on_spike must be a function of a dict, but got {type(on_spike).__name__}")
        check_kinds("dead_neurons", dead_neurons)
        self._measurements = Measurements(model)
        names = self._measurements.current.names
        if not names:
            raise ValueError(f"model: {type(model).__name__} has no parameters")
        self.every, self.keep, self.updates_every, self.on_spike = every, keep, updates_every, on_spike
        self.spike_factor = float(spike_factor)
        group_names = grouped(model, names, groups)
        order = {name: i for i, name in enumerate(dict.fromkeys(group_names))}
        self._optimizer = None if optimizer is None else innermost(optimizer, self._measurements.parameters)
        kinds = dead_neurons if isinstance(dead_neurons, tuple) else RELU_LIKE if dead_neurons else ()
        self._watch = ForwardWatch(model, kinds)
        group_of = torch.tensor([order[name] for name in group_names], device="cpu")
        self._names = Names(list(order), group_of, self._watch.norms, self._watch.layers)
        self._pieces: list[Piece] | None = None  # between the optimizer's hooks
        self._transfer, self._median = Transfer(flush_every), RunningMedian()
        self._rows: deque[Row] = deque(maxlen=keep)
        self._written: dict[int, tuple[Any, int]] = {}  # TensorBoard writers and their last steps, by the writer's id
        self._step, self._next_updates = first_step, first_step
        self._handles: list[Any] = []
        if self._optimizer is not None:
            # A compiled step calls them as they are: traced, they would be a dozen graphs.
            before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
            self._handles += [
                self._optimizer.register_step_pre_hook(before), self._optimizer.register_step_post_hook(after)
            ]  # fmt: skip
        self._prepare()
        observers.add(self._measurements)

    # What happens in a step

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pieces = self._measurements.weights = None  # of a step that raised
        if not self._measurements.is_due:
            return
        self._follow()
        if is_capturing(self._measurements.parameters[0].device):
            raise RuntimeError("Monitor can't record a step that a CUDA graph captures: its hooks are not replayed. "
                               "Close it, and make one without the optimizer after the capture: call its step() after "
                               "each replay")  # fmt: skip
        if self._has_updates:
            self._measurements.copy_weights()
        # A closure computes the gradients inside of the step.
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is None:
            self._pieces = self._measurements.read_gradients(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._finish()

    @torch.no_grad()
    def step(self) -> None:
        """Records an iteration of a loop without an optimizer object.

        Call it after the update, while the parameters have their gradients. The first row has no update ratio.

        Raises:
            RuntimeError: if the monitor has an optimizer, whose steps it records by itself.
        """
        if self._optimizer is not None:
            raise RuntimeError("Monitor.step() is for loops without an optimizer: this monitor records the optimizer's "
                               "steps by itself")  # fmt: skip
        self._follow()
        self._finish()
        if self._has_updates:
            self._measurements.copy_weights()

    def _follow(self) -> None:
        """Goes on with the parameters that the model has now, and warns if the optimizer doesn't."""
        self._measurements.follow()
        if not self._measurements.replaced:
            return
        replaced, self._measurements.replaced = self._measurements.replaced, []
        if self._optimizer is None:
            return
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        left = [name for name, before, now in replaced if id(before) in trained and id(now) not in trained]
        if left:
            others = f" and {len(left) - 1} more" if len(left) > 1 else ""
            warnings.warn(
                f"Monitor: the optimizer doesn't train {left[0]!r}{others}: the model has other parameters there, as "
                "after load_state_dict(assign=True). Make the optimizer after such a load",
                stacklevel=2,
            )

    def _finish(self) -> None:
        """Makes the step's row, and sees what has arrived of those before."""
        if self._measurements.is_due:
            pieces = self._pieces
            if pieces is None:
                pieces = self._measurements.read_gradients(self._optimizer)
            pieces += self._watch.take()
            if self._has_updates:
                pieces += self._measurements.measure_updates()
                self._next_updates = self._step + self.updates_every
            self._transfer.put(Row.of(self._step, pieces))
        self._pieces = None
        self._measurements.forget()
        self._step += 1
        self._prepare()
        self._collect(wait=False)

    def _prepare(self) -> None:
        """For the step of the number self._step."""
        due = self._measurements.is_due = self._watch.is_on = self._step % self.every == 0
        self._has_updates = self._watch.reads = due and self._step >= self._next_updates

    def _collect(self, wait: bool) -> None:
        """Takes over the rows that have arrived, and calls on_spike."""
        while (row := self._transfer.next(wait)) is not None:
            norm = row.total_norm()
            times = self._median.times(norm)
            self._median.add(norm)
            row.spike = times if times is not None and times > self.spike_factor else None
            self._rows.append(row)
            if row.spike is not None and self.on_spike is not None:
                self.on_spike(records.decode(row, self._names).as_dict(self._names))

    # What a user reads

    def _records(self, wait: bool = True, after: int = -1) -> list[Record]:
        if wait:
            self._transfer.flush()
        self._collect(wait)
        return [records.decode(row, self._names) for row in self._rows if row.step > after]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the groups, in the model's order: the columns of the first four series."""
        return tuple(self._names.groups)

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Of the norms: the columns of `input_rms`."""
        return tuple(self._names.norms)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Of the ReLU-like modules: the columns of `zero_share`."""
        return tuple(self._names.layers)

    def last(self, *, wait: bool = True) -> dict[str, Any]:
        """The newest row.

        Args:
            wait: for the device. Without it, the newest row that has arrived.

        Returns:
            step, total_norm, coefficient, threshold (both None without a clip), clipped, skipped, spike (how many times
            the median the total norm is, None if it is no spike), and a dict by name for each of gradient_norm,
            nonfinite, weight_norm, update_ratio, input_rms and zero_share, without what was not measured. Empty before
            the first row.
        """
        if wait:
            self._transfer.flush()
        self._collect(wait)
        return records.decode(self._rows[-1], self._names).as_dict(self._names) if self._rows else {}

    def to_numpy(self) -> dict[str, Any]:
        """All rows as arrays: (rows,), and (rows, names) of the six series, with NaN for what was not measured.

        The keys are those of `last`, without spike. `names`, `norm_names` and `layer_names` are the columns.
        """
        return records.arrays(self._records(), self._names)

    def to_csv(self, path: str | Path) -> None:
        """Writes a line for each row. Columns are named as in gradient_norm/layer.weight."""
        check_path("path", path)
        Path(path).write_text(records.as_csv(self._records(), self._names), encoding="utf-8")

    def to_jsonl(self, path: str | Path) -> None:
        """Writes a line of JSON for each row, as from `last`. Numbers that are not finite are null."""
        check_path("path", path)
        Path(path).write_text(records.as_jsonl(self._records(), self._names), encoding="utf-8")

    def to_tensorboard(self, writer: Any, prefix: str = "fastnorm/", *, wait: bool = True) -> None:
        """Writes the rows that this writer doesn't have yet.

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter, or what has its add_scalar(tag, number, step).
            prefix: of the tags, which go on as in gradient_norm/layer.weight.
            wait: for the device. Without it, only rows that have arrived are written: for a call in the loop.
        """
        check_writer("writer", writer)
        check_string("prefix", prefix)
        _, last = self._written.get(id(writer), (writer, -1))
        for record in self._records(wait, last):
            for name, number in record.scalars(self._names):
                writer.add_scalar(prefix + name, number, record.step)
            self._written[id(writer)] = writer, record.step

    def plot(self, figure: Figure | None = None) -> Figure:
        """Draws the total norm over the steps, with threshold, clipped steps and spikes, and the norms of all groups.

        Args:
            figure: where to draw; None makes a new one.

        Raises:
            ImportError: without matplotlib.
            TypeError: for anything else, such as a file's name: the figure's savefig writes a file.
        """
        return plots.draw(self._records(), self._names, figure)

    def report(
        self, *, vanishing_below: float = 1e-7, exploding_above: float = 1e3, ratio_above: float = 100.0
    ) -> str:
        """In words: what clipped, spiked, and which layer vanished or exploded first, at which step.

        Args:
            vanishing_below: lower bound of a healthy gradient norm of a group.
            exploding_above: upper bound of it.
            ratio_above: largest norm / smallest norm above which those of the last step are uneven.

        Raises:
            TypeError: for bounds that are no numbers.
            ValueError: for bounds out of order.
        """
        check_numbers(vanishing_below=vanishing_below, exploding_above=exploding_above, ratio_above=ratio_above)
        check_bounds(vanishing_below, exploding_above, ratio_above)
        sizes = [0] * len(self._names.groups)
        for parameter, group in zip(self._measurements.parameters, self._names.group_of.tolist(), strict=True):
            sizes[group] += parameter.numel()
        bounds = vanishing_below, exploding_above, ratio_above
        return report.in_words(self._records(), self._names, sizes, bounds, self.spike_factor)

    def close(self) -> None:
        """Removes all hooks. What was recorded can still be read."""
        for handle in self._handles:
            handle.remove()
        self._watch.close()
        observers.remove(self._measurements)
        self._measurements.forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what was recorded, and no hooks: a module that has its monitor can be copied and saved."""
        self._transfer.flush()
        self._collect(wait=True)
        state = {**self.__dict__, "_handles": [], "_written": {}}
        return {**state, "_pieces": None, "_optimizer": None, "on_spike": None}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
