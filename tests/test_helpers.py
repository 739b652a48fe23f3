"""What test files share lies in tests/helpers: each test file can be run, moved or deleted without the others."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported(source: str) -> set[str]:
    """The modules that a source imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def is_a_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_") or module.rpartition(".")[2] == "conftest"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_or_conftest(path):
    assert not {name for name in imported(path.read_text()) if is_a_test(name)}


def test_what_is_no_test_is_a_helper():
    misplaced = [path.name for path in TESTS.glob("*.py") if not is_a_test(path.stem)]
    assert misplaced == [], "helpers belong into tests/helpers"


def test_every_way_to_import_is_seen():
    source = "import test_a\ndef f():\n    from conftest import g\n    import tests.test_b as c\nfrom helpers import x"
    assert {name for name in imported(source) if is_a_test(name)} == {"test_a", "conftest", "tests.test_b"}
