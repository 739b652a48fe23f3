"""Swapping changes a module's class and keeps the object.

Hooks, parameters, buffers, parametrizations, wrappers and optimizers refer to modules and parameters as objects, so the
swap doesn't affect them. The new class is fastnorm's itself if that is a subclass of the original class, as it is of
torch.nn's. Otherwise it derives from both, so that isinstance and the original's attributes and methods still hold.
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

Names = tuple[tuple[str, str], ...]  # (fastnorm's name, the module's name) of attributes with different names
RECORD = "_fastnorm_original"  # the attribute that keeps what `restore` needs
# rebuilt class -> the class it was made from, which `restore` gives back. Weak keys: torch makes a class a module.
_sources: WeakKeyDictionary[type, type] = WeakKeyDictionary()


class _Original(NamedTuple):
    """What `restore` needs. It is kept on the module, so that copies and pickles can be restored too."""

    core: type
    added: tuple[str, ...]
    replaced: dict[str, Any]


def is_swapped(module: torch.nn.Module) -> bool:
    """Whether `swap` has changed the module's class."""
    return RECORD in module.__dict__


def core_of(cls: type[Any]) -> type[Any]:
    """The class in source code below those that torch derives at run time (parametrizations, fully_shard)."""
    while _made_by_torch(cls):
        cls = cls.__bases__[-1]
    return cls


def swap(module: torch.nn.Module, target: type, attributes: Mapping[str, Any], names: Names = ()) -> None:
    """Makes the module an instance of `target` too, and adds these attributes to its own.

    names: (target's name, module's name) of parameters and eps with different names.
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
    module.__class__ = _rebuilt(type(module), core, combined(target, core, names))  # type: ignore[arg-type]
    present.update(changed)
    present[RECORD] = original


def restore(module: torch.nn.Module) -> None:
    """Undoes `swap`."""
    original, swapped = module.__dict__.pop(RECORD), type(module)
    module.__class__ = _rebuilt(swapped, core_of(swapped), original.core)
    for key, value in module.__dict__.items():
        # Wrappers of a module's forward, such as accelerate's hooks, keep the swapped class's method as an attribute.
        if isinstance(value, MethodType) and value.__func__ is swapped.forward:
            module.__dict__[key] = MethodType(type(module).forward, module)
    for key in original.added:
        module.__dict__.pop(key, None)  # the user may have deleted it
    module.__dict__.update(original.replaced)


@cache
def combined(target: type[Any], core: type[Any], names: Names = ()) -> type:
    """`target` if it is a subclass of `core`, else a new subclass of both, whose objects can be pickled."""
    if issubclass(target, core):
        return target
    namespace: dict[str, Any] = {name: _alias(other) for name, other in names}
    namespace |= _forward_with_arguments_of(core.forward, target.forward)
    if hasattr(core, "reset_parameters"):  # the original's initialisation, whatever fastnorm's is
        namespace["reset_parameters"] = core.reset_parameters

    def extra_repr(self: torch.nn.Module) -> str:
        return str(target.extra_repr(_renamed(self, target, names)))

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
    """An object without a state, for unpickling."""
    cls: Any = combined(target, core, names)
    return cls.__new__(cls)


def _renamed(module: torch.nn.Module, cls: type, names: Names) -> torch.nn.Module:
    """A copy for torch's extra_repr, which reads __dict__: it has the attributes there under fastnorm's names."""
    renamed: torch.nn.Module = object.__new__(cls)
    vars(renamed).update(vars(module) | {name: getattr(module, other) for name, other in names})
    return renamed


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


def _forward_with_arguments_of(original: Callable[..., Any], forward: FunctionType) -> dict[str, FunctionType]:
    """{"forward": the function, with the original's names for its input and gate}; {} if it has them.

    A gate that the original can't do without has no default. A wrapper would take time in every call.
    """
    code, (_, *arguments) = forward.__code__, inspect.signature(original).parameters.values()
    given = tuple(argument.name for argument in arguments)
    own, *names = code.co_varnames
    needs_gate = len(given) == 2 and arguments[1].default is inspect.Parameter.empty
    if given == tuple(names[: len(given)]) and not needs_gate:
        return {}
    others = (f"{name}_" if name in given else name for name in names[len(given) :])
    renamed: Any = FunctionType(
        code.replace(co_varnames=(own, *given, *others)), forward.__globals__, forward.__name__,
        None if needs_gate else forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    renamed.renamed_from = forward
    return {"forward": renamed}


def _rebuilt(cls: type, old: type, new: type) -> type:
    """The class with its base `old` replaced by `new`."""
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
    """Whether torch made the class at run time: then its module has no class of this name."""
    if not cls.__module__.startswith("torch."):
        return False
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls
