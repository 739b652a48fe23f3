"""What the markers `card` and `fast` choose among all tests, as pytest finds them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

TESTS = Path(__file__).parents[1]
COLLECT = """
import json, sys, pytest

def parameters(item):
    return {k: str(v) for k, v in item.callspec.params.items()} if hasattr(item, "callspec") else {}

class Report:
    def pytest_collection_finish(self, session):
        from helpers import fast_selection  # imports fastnorm, which must come after conftest
        json.dump([(item.nodeid, parameters(item), [m.name for m in item.iter_markers()], fast_selection.cell_of(item))
                   for item in session.items], open(sys.argv[1], "w"))

arguments = ["--collect-only", "-qq", "-m", "card or fast", "-p", "no:cacheprovider", sys.argv[2]]
sys.exit(pytest.main(arguments, [Report()]))
"""


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that all of its workers have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def chosen(factory: pytest.TempPathFactory, marker: str) -> list[tuple[str, dict[str, str], tuple[str, str, str]]]:
    """Name, parameters and cell of each test with the marker, in the order in which they run; of several workers of a
    run one collects and the others wait."""
    report = shared_folder(factory) / "collected.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment["PYTHONPATH"] = str(TESTS)
    with FileLock(report.with_suffix(".lock")):
        if not report.exists():  # whatever it exits with: a file that can't be imported fails by itself
            command = [sys.executable, "-c", COLLECT, report, TESTS]
            subprocess.run(command, cwd=TESTS.parent, env=environment, check=False)
    found = [line for line in json.loads(report.read_text()) if marker in line[2]]
    return [(name.partition("tests/")[2], params, tuple(cell)) for name, params, _, cell in found]
