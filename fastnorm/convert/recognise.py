"""Recognition: proposes what a module may compute, by its class and its structure. `verify` tries the proposals.

Only torch.nn's own classes are certain. For all others, subclasses included, a proposal is a guess to be verified.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..ops.gated_norm import GatedLayerNorm, GatedRMSNorm
from ..ops.group_norm import GroupNorm
from ..ops.layer_norm import LayerNorm
from ..ops.modulated_norm import AdaLayerNorm
from ..ops.rms_norm import RMSNorm
from ..ops.row_norm import ACTIVATIONS
from ..ops.sync_batch_norm import SyncBatchNorm
from . import adapted
from .swap import Names, core_of

KINDS = ("layer", "rms", "batch", "group")
OPERATIONS = {"layer": "layer_norm", "rms": "rms_norm", "batch": "batch_norm", "group": "group_norm"}
_OURS = (LayerNorm, RMSNorm, AdaLayerNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, GroupNorm)
_OTHER_NORMS: tuple[type, ...] = (nn.modules.batchnorm._NormBase, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_BATCH_NORMS: dict[type, type[Any]] = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}  # fmt: skip
_META = torch.device("meta")
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
MODULE_STATE = frozenset(vars(nn.Module()))  # the attributes of every module


@dataclass(frozen=True)
class Proposal:
    """A class of fastnorm's that may compute what a module does.

    attributes: those of its instances, without parameters, buffers and children. shapes: of inputs to try it on.
    options: arguments of its constructor that differ from the defaults. names: parameters and eps with different names.
    condition: the name and the shape of the embedding that a modulated norm takes.
    """

    kind: str
    target: type
    attributes: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Names = ()
    condition: tuple[str, tuple[int, ...]] | None = None

    @property
    def operation(self) -> str:
        if self.condition:
            return f"modulated_{OPERATIONS[self.kind]}"
        if issubclass(self.target, SyncBatchNorm):
            return "sync_batch_norm"
        return f"gated_{OPERATIONS[self.kind]}" if self.takes_gate else OPERATIONS[self.kind]

    @property
    def takes_gate(self) -> bool:
        """Whether its forward has a second input, a gate or None."""
        return issubclass(self.target, (GatedLayerNorm, GatedRMSNorm))

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.target.__name__}({options})" if options else self.target.__name__


@dataclass(frozen=True)
class Proposals:
    """is_certain: known by type, else to be verified. obstacle: why there are no proposals.

    gate: the name of the forward's second argument, which may be a gate.
    """

    found: tuple[Proposal, ...] = ()
    is_certain: bool = False
    obstacle: str = ""
    gate: str = ""


class _Unfit(Exception):
    """Why a module can't be swapped, in words of the report."""


def is_norm(module: nn.Module) -> bool:
    """Whether the report lists the module: as a norm by its class, or by its name or parameters if it is small."""
    core = core_of(type(module))
    if issubclass(core, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_OTHER_NORMS)):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return "norm" in module.original_name.lower()
    if core.__name__ in adapted.MODULATED or issubclass(core, adapted.Modulated):
        return True
    is_small = set(module._modules) <= {"act", "drop", "parametrizations"}
    return is_small and ("norm" in core.__name__.lower() or _is_structured_as_norm(module))


def proposals(module: nn.Module, kinds: tuple[str, ...]) -> Proposals:
    """The proposals for a norm, of the given kinds, the likeliest first."""
    core = core_of(type(module))
    if issubclass(core, (*_OURS, adapted.Modulated)):
        return Proposals(obstacle="is fastnorm's already")
    if isinstance(module, torch.jit.ScriptModule):
        return Proposals(obstacle="TorchScript has compiled it")
    try:
        _refuse_changed_calls(module, core)
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise _Unfit("it is lazy: run the model once before converting it")
        _refuse_shards(module)
        if target := adapted.MODULATED.get(core.__name__):
            return Proposals((_modulated(module, core, target, kinds),))
        kind = next((kind for kind, base in _BASES.items() if issubclass(core, base)), None)
        is_certain = core in (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH_NORMS)
        gate = "" if is_certain else _second_argument(core)
        if gate and (kind in ("batch", "group") or module._modules.keys() & {"act", "drop"}):
            raise _Unfit(f"its forward takes {gate} beside its input; only row norms without children can have a gate")
        if kind is None and issubclass(core, _OTHER_NORMS):
            raise _Unfit(f"fastnorm has no {core.__name__}")
        if kind is None:
            found = [proposal for proposal in _by_structure(module) if proposal.kind in kinds]
        elif kind not in kinds:
            raise _Unfit(f"{kind!r} is not among the norms asked for")
        else:
            found = list(_PROPOSERS[kind](module, core))
    except _Unfit as unfit:
        return Proposals(obstacle=str(unfit))
    return Proposals(tuple(found), is_certain, "" if found else "none of the norms asked for", gate)


def _refuse_changed_calls(module: nn.Module, core: type[Any]) -> None:
    if "forward" in module.__dict__ or core.__call__ is not nn.Module.__call__:
        raise _Unfit("its forward or __call__ is replaced by other code")


def _second_argument(core: type[Any]) -> str:
    """The name of the forward's second argument, or "". Raises for more arguments, and for other kinds of them."""
    _, *arguments = inspect.signature(core.forward).parameters.values()
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    if len(arguments) not in (1, 2) or any(argument.kind not in positional for argument in arguments):
        raise _Unfit(f"its forward takes ({', '.join(map(str, arguments))}), not the input, and perhaps a gate, alone")
    if len(arguments) == 1:
        return ""
    if all(arguments[1].default is not value for value in (None, inspect.Parameter.empty)):
        raise _Unfit(f"its forward takes ({', '.join(map(str, arguments))}): a gate's default would be None")
    return arguments[1].name


def _refuse_shards(module: nn.Module) -> None:
    """Raises for DeepSpeed's ZeRO-3 and FullyShardedDataParallel: their shards don't have the parameters' shapes."""
    found = own_parameters(module) | {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
    for name, tensor in found.items():
        if is_shard(tensor) or name in vars(module):
            raise _Unfit(f"its {name} is sharded, or no parameter: convert the model before it is wrapped")


def is_shard(parameter: Tensor | None) -> bool:
    """Whether it is one process's shard, of a framework that gathers the whole parameter for the forward."""
    return parameter is not None and (parameter.numel() == 0 or getattr(parameter, "_fsdp_flattened", False))


def _refuse_more_state(module: nn.Module, parameters: Set[str], buffers: Set[str] = frozenset()) -> None:
    """Raises for parameters, buffers and children beyond a norm's, which its formula doesn't use."""
    names = {name for name, p in own_parameters(module).items() if p is not None} - parameters
    names |= {name for name, b in module._buffers.items() if b is not None} - buffers
    names |= set(module._modules) - {"act", "drop", "parametrizations"}
    if names:
        raise _Unfit(f"a norm of its kind has no {', '.join(sorted(names))}")


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """The parameters by name. A parametrized one stands for its largest original, so that no parametrization runs."""
    found: dict[str, Tensor | None] = dict(module._parameters)
    for name, parametrization in getattr(module, "parametrizations", {}).items():
        found[name] = max(parametrization.parameters(recurse=False), key=Tensor.numel, default=None)
    return found


def _proposal(
    kind: str, template: nn.Module, shapes: list[tuple[int, ...]], target: type | None = None, names: Names = (),
    options: Mapping[str, Any] | None = None,
) -> Proposal:  # fmt: skip
    """A proposal with the attributes of `template`, which a constructor has made on the meta device."""
    target = target or type(template)
    own = {key: value for key, value in vars(template).items() if key not in MODULE_STATE}
    attributes = {key: value for key, value in own.items() if not _is_derived(target, key)}
    # forward reads the bias of a norm without one, too
    attributes |= {name: None for name, p in template._parameters.items() if p is None}
    return Proposal(kind, target, attributes, tuple(shapes), options or {}, names)


def _is_derived(cls: type, name: str) -> bool:
    attribute = getattr(cls, name, None)
    return isinstance(attribute, property) and attribute.fset is None


def _layer(module: nn.LayerNorm, core: type) -> Iterator[Proposal]:
    shape = tuple(module.normalized_shape)
    _refuse_more_state(module, {"weight", "bias"})
    has_weight, has_bias = _has_parameters(module, shape)
    if core is nn.LayerNorm:
        template = LayerNorm(shape, module.eps, has_weight, has_bias, device=_META)
        yield _proposal("layer", template, _row_shapes(shape))
    else:
        yield from _layers(module, shape, module.eps, has_weight, has_bias)


def _rms(module: nn.RMSNorm, core: type) -> Iterator[Proposal]:
    shape = tuple(module.normalized_shape)
    _refuse_more_state(module, {"weight"})
    has_weight, _ = _has_parameters(module, shape)
    if core is nn.RMSNorm:
        yield _proposal("rms", RMSNorm(shape, module.eps, has_weight, device=_META), _row_shapes(shape))
    else:
        yield from _rmses(module, shape, module.eps, has_weight)


def _layers(
    module: nn.Module, shape: tuple[int, ...], eps: float, has_weight: bool, has_bias: bool, names: Names = ()
) -> Iterator[Proposal]:
    choices: tuple[dict[str, Any], ...] = ({}, {"zero_centered": True})
    if _second_argument(core_of(type(module))):
        yield from _gated("layer", GatedLayerNorm, module, (shape, eps, has_weight, has_bias), choices, names)
        return
    for options in choices:
        template = LayerNorm(shape, eps, has_weight, has_bias, device=_META, **options)
        yield from _placed("layer", template, module, names, options)


def _rmses(
    module: nn.Module, shape: tuple[int, ...], eps: float | None, has_weight: bool, names: Names = (),
    has_bias: bool = False,
) -> Iterator[Proposal]:  # fmt: skip
    """Those without a gate have no bias."""
    roundings: tuple[dict[str, Any], ...] = ({"rounding": "llama"}, {})
    choices = (*roundings, *({"zero_centered": True} | rounding for rounding in roundings))
    if _second_argument(core_of(type(module))):
        yield from _gated("rms", GatedRMSNorm, module, (shape, eps, has_weight, has_bias), choices, names)
        return
    if has_bias:
        return
    for options in choices:
        template = RMSNorm(shape, eps, has_weight, device=_META, **options)
        yield from _placed("rms", template, module, names, options)
    if has_weight and "act" not in module._modules:
        template = adapted.WeightTypedRMSNorm(shape, eps, device=_META)
        yield _proposal("rms", template, _row_shapes(shape), names=names)


def _gated(
    kind: str, target: type[Any], module: nn.Module, arguments: tuple[Any, ...],
    choices: tuple[Mapping[str, Any], ...], names: Names,
) -> Iterator[Proposal]:  # fmt: skip
    """Row norms with a gate, in both orders, with both activations and the module's groups.

    arguments: of the target's constructor. choices: of its other options.
    """
    shape = arguments[0]
    orders = (False, True) if getattr(module, "norm_before_gate", True) is False else (True, False)
    for options, size, before, activation in itertools.product(
        choices, _group_sizes(module, math.prod(shape)), orders, ACTIVATIONS
    ):
        chosen = {"norm_before_gate": before, "activation": activation, "group_size": size, **options}
        template = target(*arguments, device=_META, **chosen)
        plain = {"norm_before_gate": True, "activation": "silu", "group_size": None}
        shown = {key: value for key, value in chosen.items() if key not in plain or value != plain[key]}
        if size == math.prod(shape):
            del shown["group_size"]
        yield _proposal(kind, template, _row_shapes(shape), names=names, options=shown)


def _group_sizes(module: nn.Module, width: int) -> tuple[int | None, ...]:
    """The sizes of groups that the module's attributes name, and the whole row, which is None."""
    sizes = [getattr(module, "group_size", None)]
    for count in (getattr(module, name, None) for name in ("n_groups", "num_groups")):
        if type(count) is int and count > 1 and width % count == 0:
            sizes.append(width // count)
    found: list[int | None] = [size for size in sizes if type(size) is int and size > 0 and width % size == 0]
    return tuple(found) if width in found else (*dict.fromkeys(found), None)


def _placed(
    kind: str, template: LayerNorm | RMSNorm, module: nn.Module, names: Names, options: Mapping[str, Any]
) -> Iterator[Proposal]:
    """A row norm over the last dimensions, and over the channels; with an activation if the module has one."""
    shape = template.normalized_shape
    over_rows, over_channels = _PLACES[kind, "act" in module._modules]
    yield _proposal(kind, template, _row_shapes(shape), over_rows, names, options)
    if len(shape) == 1:
        for layout in ({}, {"keeps_layout": True}):
            vars(template).update(layout)
            for map_shapes in ([(2, *shape, 3, 2), *_ambiguous(shape, 3)], [(2, *shape, 3), *_ambiguous(shape, 4)]):
                yield _proposal(kind, template, map_shapes, over_channels, names, {**options, **layout})


def _row_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of inputs: the first for the values, the others for what depends on the number of dimensions."""
    return [(2, 3, *shape), (5, *shape), *_ambiguous(shape, 4)]


def _ambiguous(shape: tuple[int, ...], dims: int) -> list[tuple[int, ...]]:
    """A shape that norms over dimension 1 and over the last one both accept, with different results."""
    return [(1, *shape, *[1] * (dims - 3), *shape)] if len(shape) == 1 and shape[0] <= 256 else []


def _batch(module: nn.modules.batchnorm._BatchNorm, core: type) -> Iterator[Proposal]:
    base = next(base for base in _BATCH_NORMS if issubclass(core, base))
    channels = module.num_features
    _refuse_more_state(module, {"weight", "bias"}, {"running_mean", "running_var", "num_batches_tracked"})
    has_weight, has_bias = _has_parameters(module, (channels,))
    target = _BATCH_NORMS[base]
    template = target(
        channels, module.eps, module.momentum, has_weight, module.track_running_stats,
        device=_META, **({"process_group": module.process_group} if target is SyncBatchNorm else {}),
    )  # fmt: skip
    if not has_bias:
        template.bias = None  # older torch's constructor has no bias=False
    shapes: dict[type, list[tuple[int, ...]]] = {
        BatchNorm1d: [(6, channels), (4, channels, 3)], BatchNorm3d: [(2, channels, 2, 2, 3)],
    }  # fmt: skip
    if target is SyncBatchNorm and core is not nn.SyncBatchNorm:
        raise _Unfit("subclasses of SyncBatchNorm can't be compared in one process")
    has_act = "act" in module._modules
    if has_act and target is not BatchNorm2d:
        raise _Unfit("of the batch norms, only BatchNorm2d can have an activation module")
    own_shapes = shapes.get(target, [(3, channels, 2, 3)])
    yield _proposal("batch", template, own_shapes, adapted.BatchNormAct2d if has_act else None)


def _group(module: nn.GroupNorm, core: type) -> Iterator[Proposal]:
    channels = module.num_channels
    _refuse_more_state(module, {"weight", "bias"})
    has_weight, has_bias = _has_parameters(module, (channels,))
    template = GroupNorm(module.num_groups, channels, module.eps, has_weight, device=_META)
    if not has_bias:
        template.register_parameter("bias", None)
    target = adapted.GroupNormAct if "act" in module._modules else None
    yield _proposal("group", template, [(2, channels, 3, 2), (3, channels, 4)], target)


def _modulated(module: nn.Module, core: type[Any], target: type[Any], kinds: tuple[str, ...]) -> Proposal:
    """diffusers' norms that take an embedding, by their names; verification finds whether they compute the same."""
    given = [*inspect.signature(core.forward).parameters]
    if given != [*inspect.signature(target.forward).parameters]:
        raise _Unfit(f"its forward takes ({', '.join(given[1:])}), not what diffusers' does")
    children = module._modules
    norm, projection = children.get("norm"), children.get(target.PROJECTION)
    width = getattr(projection, "out_features", 0) // target.CHUNKS
    if norm is None or not width or type(getattr(norm, "eps", None)) is not float:
        raise _Unfit(f"it has no norm with an eps, or no {target.PROJECTION} with out_features, as diffusers' have")
    _refuse_shards(norm)
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    if kind not in kinds:
        raise _Unfit(f"{kind!r} is not among the norms asked for")
    name = target.CONDITION if children.get("emb") is None else "timestep"
    samples = () if getattr(module, "chunk_dim", 1) == 0 else (2,)
    return Proposal(kind, target, {}, ((2, 3, width),), condition=(name, (*samples, 8)))


def _by_structure(module: nn.Module) -> Iterator[Proposal]:
    """Proposals for other classes than torch's: at most a weight and a bias of one dimension, and at most one eps."""
    parameters = {name: p for name, p in own_parameters(module).items() if p is not None}
    _refuse_more_state(module, set(parameters))
    kept = {key: value for key, value in vars(module).items() if "eps" in key.lower() and type(value) is float}
    if len(kept) > 1:
        raise _Unfit("it has several attributes named eps")
    if kept:
        ((name, eps),) = kept.items()
        yield from _with_eps(module, parameters, eps, () if name == "eps" else (("eps", name),))
    else:  # a constant in the forward, which verification finds
        for eps in _USUAL_EPS:
            yield from _with_eps(module, parameters, eps, ())


def _with_eps(module: nn.Module, parameters: Mapping[str, Tensor], eps: float, beside: Names) -> Iterator[Proposal]:
    """Proposals with this eps.

    beside: eps's name in the module, if it is another: setting it must still have an effect after the swap.
    """
    shapes = {tuple(p.shape) for p in parameters.values()}
    if len(parameters) > 2 or len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise _Unfit("its parameters are not a weight, or a weight and a bias, of one dimension")
    if not parameters:
        if gate := _second_argument(core_of(type(module))):
            raise _Unfit(f"it has no weight, which would tell the width of its input and its {gate}")
        inputs: list[tuple[int, ...]] = [(2, 3, 24), (5, 40), (1, 6, 2, 6)]
        yield _proposal("rms", adapted.UnweightedRMSNorm(eps), inputs, names=beside)
        if type(shape := getattr(module, "normalized_shape", None)) is tuple:
            yield from _placed("layer", LayerNorm(shape, eps, False, device=_META), module, beside, {})
        return
    width = shapes.pop()
    given = tuple(parameters)
    for order in (given,) if len(given) == 1 else (given, given[::-1]):
        names = (*beside, *((o, n) for o, n in zip(("weight", "bias"), order, strict=False) if o != n))
        if set(dict(names)) & set(parameters):
            continue  # a parameter named weight is no bias
        yield from _rmses(module, width, eps, True, names, len(order) == 2)
        yield from _layers(module, width, eps, True, len(order) == 2, names)


def _is_structured_as_norm(module: nn.Module) -> bool:
    """Whether the module has a weight, and perhaps a bias, of one dimension, and an eps."""
    parameters = [p for p in own_parameters(module).values() if p is not None]
    has_eps = any("eps" in key.lower() and type(value) is float for key, value in vars(module).items())
    return has_eps and 1 <= len(parameters) <= 2 and all(p.dim() == 1 for p in parameters)


def _has_parameters(module: nn.Module, shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether it has a weight and a bias. Raises for another shape; a parametrized one may be made of any shape."""
    parameters = own_parameters(module)
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None and tuple(parameter.shape) != shape:
            raise _Unfit(f"its {name} has the shape {list(parameter.shape)}, not {list(shape)}")
    has_weight, has_bias = (parameters.get(name) is not None for name in ("weight", "bias"))
    if has_bias and not has_weight:
        raise _Unfit("it has a bias without a weight")
    return has_weight, has_bias


# (kind, has an activation): classes over the last dimensions and over the channels
_PLACES = {
    ("layer", False): (LayerNorm, adapted.LayerNorm2d),
    ("layer", True): (adapted.LayerNormAct, adapted.LayerNormAct2d),
    ("rms", False): (RMSNorm, adapted.RMSNorm2d),
    ("rms", True): (adapted.RMSNormAct, adapted.RMSNormAct2d),
}
_BASES: dict[str, type | tuple[type, ...]] = {
    "layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": tuple(_BATCH_NORMS), "group": nn.GroupNorm
}  # fmt: skip
_PROPOSERS: dict[str, Callable[..., Iterator[Proposal]]] = {
    "layer": _layer, "rms": _rms, "batch": _batch, "group": _group
}  # fmt: skip
