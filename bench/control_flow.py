"""Instructions that a thread executes in a step of a kernel, counted in its disassembly: no GPU runs anything here.

A step is one turn of the loops that walk over the data, or the whole of a kernel without such loops. Where the code
branches, the way is counted that moves all of a step's bytes to and from global memory, and of several such the
shortest: that of a whole tile, not that of a tensor's end, nor a repetition in float64 of what float32 could not hold.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

import networkx as nx  # torch brings it


class Way(NamedTuple):
    """What a thread does on a way through the code."""

    bytes: float  # of global memory
    instructions: float


@dataclass(frozen=True)
class Instruction:
    """Of machine code: `target` is the label that it may jump to; one that `ends` never goes on to the next one."""

    bytes: int
    target: str | None
    ends: bool


@dataclass(frozen=True)
class Code:
    """A kernel as a graph: the successors of each instruction, the first one being its entry."""

    instructions: list[Instruction]
    successors: list[list[int]]

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """The instructions of each loop that can be reached, by its first one."""
        graph = nx.DiGraph((source, goal) for source, goals in enumerate(self.successors) for goal in goals)
        graph.add_node(0)
        graph = graph.subgraph({0} | nx.descendants(graph, 0)).copy()
        found: dict[int, set[int]] = {}
        above = set()  # what the search, depth first, has entered and not left
        for source, first, kind in nx.dfs_labeled_edges(graph, 0):
            if kind == "forward":
                above.add(first)
            elif kind == "reverse":
                above.discard(first)
            elif first in above:
                # what leads to the jump back without passing the loop's first instruction
                around = graph.reverse()
                around.remove_node(first)
                body = nx.descendants(around, source) | {source} if source != first else set()
                found.setdefault(first, {first}).update(body)
        return found

    def steps(self, passes: int, inner_bytes: float | None = None, least_bytes: float | None = None) -> list[Way]:
        """One turn of each of the `passes` loops that move most bytes, in the order of the code. Without passes, the
        whole kernel. Fewer where the kernel has fewer such loops.

        inner_bytes: what loops inside of these move in all their turns, of which there is one where it is not known;
        least_bytes: what a way has to move; where it is known, the shortest such way is taken."""
        if passes == 0:
            return [_chosen(self._ways(0, set(range(len(self.instructions))), None), None)]
        ways = [
            (_chosen(self._ways(first, body, inner_bytes), least_bytes), first)
            for first, body in self.loops.items()
            if not any(first in other for start, other in self.loops.items() if start != first)
        ]
        moving = sorted((way for way in ways if way[0].bytes), key=lambda way: (-way[0].bytes, way[0].instructions))
        return [way for way, _ in sorted(moving[:passes], key=lambda way: way[1])]

    def _ways(self, first: int, region: set[int], inner_bytes: float | None) -> dict[float, float]:
        """From `first` to a jump back to it, or out of the kernel: the fewest instructions by the bytes moved."""
        inside = {f: body for f, body in self.loops.items() if f != first and f in region and body < region}
        outermost = {f: body for f, body in inside.items() if not any(f in b for o, b in inside.items() if o != f)}
        place = {node: f for f, body in outermost.items() for node in body}
        goals: dict[int, set[int]] = {}
        for node in region:
            here = place.get(node, node)
            ahead = {place.get(goal, goal) for goal in self.successors[node] if goal in region and goal != first}
            goals.setdefault(here, set()).update(ahead - {here})
        if not any(self.instructions[node].bytes for node in goals if node not in outermost):
            inner_bytes = None  # not a loop in a loop, but one loop that is entered in two places
        found: dict[int, dict[float, float]] = {}
        order = nx.DiGraph(goals)  # without a cycle: each after all that it leads to
        for node in nx.dfs_postorder_nodes(order, place.get(first, first)):
            own = Way(self.instructions[node].bytes, 1)
            if node in outermost:
                own = _chosen(self._ways(node, outermost[node], inner_bytes), None)
                if inner_bytes is not None and own.bytes:
                    own = Way(inner_bytes, own.instructions * inner_bytes / own.bytes)
            rest = [way for goal in goals[node] for way in found[goal].items()] or [(0, 0)]
            found[node] = {}
            for moved, instructions in rest:
                total, length = moved + own.bytes, instructions + own.instructions
                found[node][total] = min(length, found[node].get(total, length))
        return found[place.get(first, first)]


def _chosen(ways: dict[float, float], least_bytes: float | None) -> Way:
    enough = [way for way in ways.items() if least_bytes is not None and way[0] >= least_bytes]
    return Way(*(min(enough, key=lambda way: way[1]) if enough else max(ways.items())))


def parse(assembly: str) -> Code:
    """nvdisasm's text, or LLVM's for AMD. Raises ValueError where no instruction is in it."""
    dialect = _NVIDIA if "/*0000*/" in assembly else _AMD
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in assembly.splitlines():
        if label := dialect.label.match(line):
            labels[label[1]] = len(instructions)
        elif (found := dialect.line.search(line)) and not _IDLE.match(text := found["text"]):
            jump, access = dialect.jump.search(text), dialect.access.search(text)
            size = dialect.bytes(access[1]) if access else 0
            instructions.append(Instruction(size, jump and jump[1], bool(dialect.end.match(text))))
    if not instructions:
        raise ValueError("no machine code in this text")
    successors = []
    for i, instruction in enumerate(instructions):
        goals = [] if instruction.ends or i + 1 == len(instructions) else [i + 1]
        jump = labels.get(instruction.target, len(instructions))
        successors.append(goals + [jump] * (jump < len(instructions) and jump not in goals))
    return Code(instructions, successors)


def _nvidia_bytes(kind: str) -> int:
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
    return next((sizes[each] for each in kind.split(".") if each in sizes), 4)


def amd_bytes(kind: str) -> int:
    """Of an access: dwordx4 is what newer targets call b128."""
    if words := re.fullmatch(r"dword(?:x(\d))?", kind):
        return 4 * int(words[1] or 1)
    if "short" in kind or "byte" in kind:
        return 2 if "short" in kind else 1
    return int(re.findall(r"\d+", kind)[0]) // 8


# how a disassembler writes; `bytes` are those of the kind that `access` finds
_NVIDIA = SimpleNamespace(
    line=re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]*?)\s*;"), label=re.compile(r"^(\.L_x_\d+):"),
    jump=re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)"),
    end=re.compile(r"BRA(\.\w+)* `|(EXIT|RET|BRX|JMP)\b"),
    access=re.compile(r"\b(?:LDG|STG|LD|ST)\.E((?:\.\w+)*)"), bytes=_nvidia_bytes,
)
_AMD = SimpleNamespace(
    line=re.compile(r"^\s+(?P<text>[a-z][^;]*)"), label=re.compile(r"^(\.LBB\d+_\d+):"),
    jump=re.compile(r"^s_c?branch\w*\s+(\.LBB\d+_\d+)"), end=re.compile(r"s_branch|s_endpgm|s_setpc"),
    access=re.compile(r"^(?:global|buffer|flat)_(?:load|store)_(\w+)"), bytes=amd_bytes,
)
_IDLE = re.compile(r"(?:@!?U?P\w+ )?NOP|s_nop|s_code_end")
