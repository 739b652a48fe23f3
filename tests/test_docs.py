"""README and docs/: their Python runs, their figures are those of bench/results, and the API page has every name."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastnorm
from fastnorm import backend

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "docs" / "_tools"
EXCERPTS = {"internals.md", "adding_an_operation.md"}  # which show code of the project, not calls of it
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in EXCERPTS)]
# What a reader sees, and what makes it run, in a comment that begins with "run".
BLOCK = re.compile(r"^(?:```python\n(.*?)^```|<!-- run\n(.*?)^-->)", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def users_backend():
    """What a CPU takes outside of the tests, which start Triton's interpreter."""
    with fastnorm.use("native" if backend.statuses()["native"].available else "reference"):
        yield
    torch._dynamo.reset()


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_a_page_runs(page):
    """Block by block, in one namespace, as a reader pastes them."""
    text = page.read_text(encoding="utf-8")
    names: dict = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        group = 1 if block[1] is not None else 2
        code = "\n" * text.count("\n", 0, block.start(group)) + block[group]
        exec(compile(code, str(page), "exec"), names)


def test_every_operation_has_a_page_that_runs():
    pages = {page.stem for page in WITH_CODE}
    assert {"README", "index", "layer_norm", "rms_norm", "batch_norm", "sync_batch_norm", "group_norm"} <= pages
    assert {"clipping", "faq", "numerics", "install", "models"} <= pages


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: fastnorm\.([\w.]+)$", text, re.MULTILINE)
    public = {*fastnorm.__all__} - {"functional"}
    functionals = {f"functional.{name}" for name in fastnorm.functional.__all__}
    assert {*found} == public | functionals and len(found) == len({*found})


def test_figures_are_those_of_the_results():
    """`python docs/_tools/figures.py` draws them."""
    drawn = tool("figures").figures()
    assert {path.name for path in (ROOT / "docs" / "figures").glob("*.svg")} == {*drawn}
    for name, drawing in drawn.items():
        assert (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8") == drawing, name


def test_notebooks_show_what_they_compute():
    """They were run from top to bottom before they were committed. `make docs` runs them again."""
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 3
    for path in notebooks:
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], path.name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert outputs and all(output["output_type"] != "error" for output in outputs), path.name
