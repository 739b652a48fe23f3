"""A norm becomes fastnorm's by its class: the object stays, and with it all that hangs on it or refers to it.

Hooks, parameters, buffers, parametrizations, wrappers and optimizers know modules and parameters as objects, so none
of them notices. The new class is fastnorm's alone where that is a subclass of the original one, as it is of torch.nn's;
else it derives from both, so that isinstance and the original's attributes and methods still hold.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

Names = tuple[tuple[str, str], ...]
_RECORD = "_fastnorm_original"
# the very class that a rebuilt one was made from, to be given back; by weak keys, as torch makes classes by the module
_sources: WeakKeyDictionary[type, type] = WeakKeyDictionary()


class _Original(NamedTuple):
    """What `restore` needs, kept on the module, so that copies and pickles of it can be restored as well."""

    core: type
    added: tuple[str, ...]
    replaced: dict[str, Any]


def is_swapped(module: torch.nn.Module) -> bool:
    """Whether `swap` made the module what it is."""
    return _RECORD in module.__dict__


def core_of(cls: type) -> type:
    """The class that somebody wrote, below those that torch derives at run time (parametrizations, fully_shard)."""
    while _made_by_torch(cls):
        cls = cls.__bases__[-1]
    return cls


def swap(module: torch.nn.Module, target: type, attributes: Mapping[str, Any], names: Names = ()) -> None:
    """Makes the module an instance of `target` too, with these attributes beside its own.

    names: (target's name, module's name) of parameters and eps where the module calls them otherwise.
    Raises TypeError where Python can't change the class of such an object.
    """
    core = core_of(type(module))
    present = module.__dict__
    own = {key: value for key, value in attributes.items() if key not in dict(names)}
    changed = {key: value for key, value in own.items() if key not in present or present[key] != value}
    original = _Original(
        core,
        tuple(key for key in changed if key not in present),
        {key: present[key] for key in changed if key in present},
    )
    module.__class__ = _rebuilt(type(module), core, combined(target, core, names))
    present.update(changed)
    present[_RECORD] = original


def restore(module: torch.nn.Module) -> None:
    """Takes `swap` back."""
    original, swapped = module.__dict__.pop(_RECORD), type(module)
    module.__class__ = _rebuilt(swapped, core_of(swapped), original.core)
    for key, value in module.__dict__.items():
        # what wraps a module's forward, such as accelerate's hooks, keeps the method of before among its attributes
        if isinstance(value, MethodType) and value.__func__ is swapped.forward:
            module.__dict__[key] = MethodType(type(module).forward, module)
    for key in original.added:
        module.__dict__.pop(key, None)  # the module's user may have deleted it
    module.__dict__.update(original.replaced)


@cache
def combined(target: type, core: type, names: Names = ()) -> type:
    """`target` where it is a subclass of `core`, else a subclass of both, which can be pickled."""
    if issubclass(target, core):
        return target
    namespace: dict[str, Any] = {name: _alias(other) for name, other in names}
    if (argument := argument_of(core.forward)) not in target.forward.__code__.co_varnames:
        namespace["forward"] = _with_argument(target.forward, argument)

    if hasattr(core, "reset_parameters"):  # how it starts is not what it computes
        namespace["reset_parameters"] = core.reset_parameters

    def extra_repr(self: torch.nn.Module) -> str:
        return target.extra_repr(_renamed(self, target, names))

    def reduce(self: torch.nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _blank, (target, core, names), object.__reduce_ex__(self, 2)[2]

    namespace |= {
        "extra_repr": extra_repr,
        "__doc__": f"{core.__module__}.{core.__qualname__}, computed by fastnorm's {target.__name__}.",
        "__module__": __name__,
        "__reduce_ex__": reduce,
    }
    return type(f"Fast{core.__name__}", (target, core), namespace)


def _blank(target: type, core: type, names: Names) -> torch.nn.Module:
    """An object that a pickle's state is then given to."""
    cls = combined(target, core, names)
    return cls.__new__(cls)


def _renamed(module: torch.nn.Module, cls: type, names: Names) -> torch.nn.Module:
    """For torch's extra_repr, which reads attributes off __dict__: a module that has them there by our names."""
    renamed = object.__new__(cls)
    vars(renamed).update(vars(module) | {ours: getattr(module, theirs) for ours, theirs in names})
    return renamed


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


def argument_of(forward: Callable[..., Any]) -> str:
    """What the input is called in calls by keyword."""
    return list(inspect.signature(forward).parameters)[1]


def _with_argument(forward: FunctionType, name: str) -> FunctionType:
    """The function with its input called otherwise. A wrapper would cost every call what this costs none."""
    code = forward.__code__
    own, _, *others = code.co_varnames
    renamed = FunctionType(
        code.replace(co_varnames=(own, name, *others)), forward.__globals__, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    renamed.renamed_from = forward
    return renamed


def _rebuilt(cls: type, old: type, new: type) -> type:
    """The class with `new` in the place of its base `old`."""
    if cls is old:
        return new
    source = _sources.get(cls)
    if source is not None and core_of(source) is new:
        return source
    bases = tuple(_rebuilt(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    result = type(cls.__name__.replace(old.__name__, new.__name__), bases, namespace)
    _sources[result] = cls
    return result


def _made_by_torch(cls: type) -> bool:
    """Whether a function of torch made the class: then its module has no class of this name."""
    if not cls.__module__.startswith("torch."):
        return False
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls
