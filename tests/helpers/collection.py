"""What the markers `card` and `fast` choose among all tests, as pytest finds them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

TESTS = Path(__file__).parents[1]
# Of each test with one of the markers: name, parameters, markers, cell. In the order in which `-m card` runs them.
Chosen = list[tuple[str, dict[str, str], list[str], tuple[str, str, str]]]
FOUND = pytest.StashKey[Chosen]()
COLLECT = """
import json, sys, pytest
from pathlib import Path

class Report:
    def pytest_collection_finish(self, session):
        from helpers.collection import FOUND  # imports fastnorm, which must come after conftest
        Path(sys.argv[1]).write_text(json.dumps(session.config.stash[FOUND]))

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", sys.argv[2]], [Report()]))
"""


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that all of its workers have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def keep(config: pytest.Config, items: Sequence[pytest.Item], card: Sequence[pytest.Item], cell_of) -> None:
    """Keeps what was collected for `chosen`; `card`: the tests of that marker, in their order."""
    others = set(items) - set(card)
    marked = [*card, *(item for item in items if item in others and item.get_closest_marker("fast"))]
    config.stash[FOUND] = [
        (item.nodeid.partition("tests/")[2], _parameters(item), [m.name for m in item.iter_markers()], cell_of(item))
        for item in marked
    ]


def _parameters(item: pytest.Item) -> dict[str, str]:
    return {name: str(value) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {}


def chosen(request: pytest.FixtureRequest, marker: str) -> list[tuple[str, dict[str, str], tuple[str, str, str]]]:
    """Name, parameters and cell of each test with the marker. A run of some of the files collects all in another
    process; of several workers one does it, and the others wait."""
    found = request.config.stash[FOUND]
    start = request.config.invocation_params.dir
    if not all(start / argument in (TESTS, TESTS.parent) for argument in request.config.args):
        report = shared_folder(request.getfixturevalue("tmp_path_factory")) / "collected.json"
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        environment["PYTHONPATH"] = str(TESTS)
        with FileLock(report.with_suffix(".lock")):
            if not report.exists():  # whatever it exits with: a file that can't be imported fails by itself
                command = [sys.executable, "-c", COLLECT, report, TESTS]
                subprocess.run(command, cwd=TESTS.parent, env=environment, check=False)
        found = json.loads(report.read_text())
    return [(name, given, tuple(cell)) for name, given, markers, cell in found if marker in markers]
