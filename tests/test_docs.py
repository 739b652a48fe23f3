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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "docs" / "_tools"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Block by block, in one namespace, as a reader pastes them; what they write goes to a folder of the test's."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        group = 1 if block[1] is not None else 2
        code = "\n" * text.count("\n", 0, block.start(group)) + block[group]
        exec(compile(code, str(page), "exec"), names)


def test_every_operation_has_a_page_that_runs():
    pages = {page.stem for page in WITH_CODE}
    assert {"README", "index", "layer_norm", "rms_norm", "batch_norm", "sync_batch_norm", "group_norm"} <= pages
    assert {"clipping", "monitor", "faq", "numerics", "install", "models"} <= pages


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_links_of_the_readme_lead_somewhere():
    """MkDocs sees the pages' own links, and not the README's."""
    links = re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


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


MAPS = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "internals.md"]
FOLDERS = ("csrc", "csrc/cpu", "csrc/cuda", "triton_kernels", "fastnorm")


def test_internals_name_every_file():
    """A header and its source may stand as `views.h, .cpp`."""
    text = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
    whole = set(re.findall(r"[\w]+\.(?:cpp|h|cu|cuh|py)\b", text))
    pairs = {stem + ending for stem, ending in re.findall(r"`(\w+)\.h(?:`|, )[,`]* *`?(\.\w+)`?", text)}
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).iterdir() if path.is_file()}
    sources = {name for name in files if name.endswith((".cpp", ".h", ".cu", ".cuh", ".py")) and name[0] != "_"}
    untold = {"functional.py", "text.py"}  # which only list names, and join words
    assert sources - whole - pairs == untold


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_what_a_map_names_is_there(page):
    """Paths, and the functions that stand before a path in brackets."""
    text = page.read_text(encoding="utf-8")
    paths = {path.split("#")[0] for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text)}
    here = [p for p in paths if p.split("/")[0] in ("fastnorm", "triton_kernels", "csrc", "tests", "bench", "docs")]
    assert len(here) > 10
    assert [p for p in here if not (ROOT / p).exists()] == []
    named = re.findall(r"`([\w:.]+)` \(`([\w/]+\.\w+)`\)", text)
    for name, path in named:
        if (ROOT / path).exists():
            assert name.split(".")[-1].split("::")[-1] in (ROOT / path).read_text(encoding="utf-8"), (name, path)
