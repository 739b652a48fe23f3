"""torch.jit.script compiles torch.nn's norm in place of fastnorm's, which it gets from __prepare_scriptable__."""

from __future__ import annotations

import copy
import inspect

from torch import nn

from .arguments import options_repr


def scriptable(module: nn.Module) -> nn.Module:
    """torch.nn's norm, or the one that `convert` swapped, with the module's own parameters and buffers.

    Raises RuntimeError for subclasses, and where an option is set that torch.nn's norm doesn't have.
    """
    from ..convert.swap import is_swapped, restore

    own = type(module)
    stock, twin = own.__bases__[-1], copy.copy(module)
    if is_swapped(module):
        restore(twin)
        return twin
    keywords = (p for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY)
    defaults = {p.name: p.default for p in keywords if p.name in vars(module)}
    options = options_repr(module, **defaults).removeprefix(", ")
    if options or stock is nn.Module or not stock.__module__.startswith("torch.nn."):
        raise RuntimeError(
            f"torch.jit.script can't compile {own.__name__}({options}), because torch.nn has no such module: "
            "use torch.jit.trace"
        )
    twin.__class__ = stock
    for name in (*defaults, "_eps"):
        twin.__dict__.pop(name, None)
    return twin
