"""Arguments that stand for tensors: above all the proxies of torch.fx's symbolic tracing.

A functional gives such a call to the argument's __torch_function__, as torch.nn.functional does, so that the call
becomes one node of the graph. A module with further state becomes a node as a module, as torch.nn's do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer


class Overridden(Exception):
    """Raised where an argument that is no tensor has a __torch_function__, which then handles the call."""


def refuse_overridden(*arguments: Any) -> None:
    """Raises Overridden for an argument that is no tensor and has a __torch_function__.

    Tensor subclasses don't count: they see the operations of the call.
    """
    for argument in arguments:
        if not isinstance(argument, (Tensor, type(None))) and hasattr(type(argument), "__torch_function__"):
            raise Overridden


def module_node(module: nn.Module, forward: Any, *inputs: Any) -> Proxy | None:
    """The module's call as a node of the graph being traced; None where tracing goes through its forward, or none runs.

    As a node, the module keeps what tracing through it would freeze: training mode, counters, options.
    forward: the calling function. If a subclass overrides it, tracing goes through the subclass's forward.
    """
    tracer = next((x.tracer for x in inputs if isinstance(x, Proxy)), None)
    own = type(module).forward
    is_own = getattr(own, "renamed_from", own) is forward and "forward" not in vars(module)
    if not is_own or not isinstance(tracer, Tracer):
        return None
    path = tracer.path_of_module(module)
    if not path:  # the root module has no name in the graph
        return None
    given = tuple(x for x in inputs if x is not None)
    if has_hooks(module):  # the pre-hooks have been traced already, so that the graph calls the forward behind them
        return tracer.create_proxy("get_attr", path, (), {}).forward(*given)
    return tracer.create_proxy("call_module", path, given, {})


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks observe the module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

