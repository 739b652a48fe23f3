"""The tests with the marker `fast`: what `make test-fast` runs while one edits.

Of each test function one case is taken for each operation, backend and dtype that its parameters name: the one whose
other parameters, such as shape and layout, have values that were taken least so far. Tests with the marker `slow` are
left out, and those of the benchmarks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import is_dataclass

import pytest

import fastnorm
from helpers.card_selection import BACKEND, parameters

Cell = tuple[str, str, str]  # of operation, backend and dtype; "" for what the test does not name


def selected(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The items of `make test-fast`, in their order."""
    groups: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None and not item.path.name.startswith("test_bench"):
            groups.setdefault((item.path, item.originalname, *cell_of(item)), []).append(item)
    taken: dict[tuple, Counter] = {}
    chosen = set()
    for (path, function, *_), cases in groups.items():
        counts = taken.setdefault((path, function), Counter())
        best = min(cases, key=lambda item: sum(counts[value] for value in values_of(item)))
        counts.update(values_of(best))
        chosen.add(best)
    return [item for item in items if item in chosen]


def cell_of(item: pytest.Item) -> Cell:
    """Operations go by the parameter `op`, by that of a case, or by a module's `name`."""
    given = parameters(item)
    case = next((value for value in given.values() if is_dataclass(value)), None)
    module = given["name"] if hasattr(fastnorm, str(given.get("name"))) else ""
    operation = given.get("op", getattr(case, "op", module))
    backend = next((given[name] for name in BACKEND if name in given), "")
    return str(operation), str(backend), str(given.get("dtype", getattr(case, "dtype", ""))).removeprefix("torch.")


def values_of(item: pytest.Item) -> list[tuple[str, str]]:
    return [(name, repr(value)) for name, value in parameters(item).items()]
