"""Arguments that stand for tensors without being any: above all the proxies of torch.fx's symbolic tracing.

A functional hands such a call to the argument's __torch_function__, as torch.nn.functional does, so that it becomes
one node of the graph. Modules that have a state beside their parameters become a node as modules, as torch.nn's do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer


class Overridden(Exception):
    """An argument that is no tensor has a __torch_function__, which is to decide what the call does."""


def refuse_overridden(*arguments: Any) -> None:
    """Raises Overridden for such an argument. Tensor subclasses are none: they see the operations that a call takes."""
    for argument in arguments:
        if not isinstance(argument, (Tensor, type(None))) and hasattr(type(argument), "__torch_function__"):
            raise Overridden


def module_node(module: nn.Module, forward: Any, *inputs: Any) -> Proxy | None:
    """The module's call as a node of the graph that is traced; None where nothing is traced, or its forward is to be.

    So the graph keeps the module, and with it what tracing would freeze: training mode, counters, options.
    forward: the function that asks. One of a subclass that calls it has more to do, and is traced through.
    """
    tracer = next((x.tracer for x in inputs if isinstance(x, Proxy)), None)
    own = type(module).forward
    is_own = getattr(own, "renamed_from", own) is forward and "forward" not in vars(module)
    if not is_own or not isinstance(tracer, Tracer):
        return None
    path = tracer.path_of_module(module)
    if not path:  # it is the root itself, which has no name to be called by
        return None
    given = tuple(x for x in inputs if x is not None)
    if has_hooks(module):  # they have run, and been traced, by now: the graph must call what lies behind them
        return tracer.create_proxy("get_attr", path, (), {}).forward(*given)
    return tracer.create_proxy("call_module", path, given, {})


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks on at the module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

