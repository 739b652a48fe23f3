"""The graphs that torch.compile makes, and which operators are in them."""

import torch
from torch._dynamo.backends.common import aot_autograd

NAMESPACES = {"native": "fastnorm", "triton": "fastnorm_triton", "reference": None}


class Graphs:
    """A compiler that keeps the graphs it is given, forward and backward, and runs them as they are."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.compiler = aot_autograd(fw_compiler=self.keep(self.forward), bw_compiler=self.keep(self.backward))

    @staticmethod
    def keep(graphs: list):
        def compiler(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        return compiler


def called(graphs) -> set[str]:
    """The names of the operators in some graphs, and in the graphs that these hold."""
    parts = [part for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    return {str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function"}


def ours(graphs) -> set[str]:
    return {name.removesuffix(".default") for name in called(graphs) if name.startswith("fastnorm")}
