"""The examples as `make examples` runs them, only shorter: every claim holds, and one that doesn't is an error."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_kernels")]
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "stability"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The scripts and their common module, as Python finds them when it runs one of them."""
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in (*SCRIPTS, "common"):
        sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def lines_but_the_last(text: str) -> list[str]:
    """The last one names the file and the time."""
    return text.rstrip().splitlines()[:-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_claims_hold_and_a_plot_is_written(script, tmp_path, capsys):
    assert load(script).main(["--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "holds" in printed and "FAILS" not in printed
    plot = (tmp_path / f"{script}.png").read_bytes()
    assert plot.startswith(PNG) and len(plot) < 100_000


def test_numbers_are_the_same_each_time(tmp_path, capsys):
    printed = []
    for _ in range(2):
        assert load("clip_safety_net").main(["--quick", "--output", str(tmp_path)]) == 0
        printed.append(lines_but_the_last(capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_norm_that_depends_on_the_batch_fails_its_claim(tmp_path, capsys, monkeypatch):
    script = load("batch_noise")
    monkeypatch.setitem(script.NORMS, "GroupNorm", script.NORMS["BatchNorm"])
    assert script.main(["--quick", "--output", str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert len(failed) == 1 and "GroupNorm" in failed[0]


@pytest.mark.parametrize("eigenvalues", [(3.0, 1.0, -5.0), (-1.0, -2.0, -4.0), (4.0, 2.0, -1.0)])
def test_power_iteration_finds_the_largest_eigenvalue_even_if_another_has_the_largest_modulus(eigenvalues):
    random = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))
    parameters = [torch.nn.Parameter(torch.randn(n, generator=random, dtype=torch.float64)) for n in (1, 2)]
    x = torch.cat(parameters)
    loss = x @ basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T @ x / 2
    found = load("learning_rate").largest_eigenvalue(loss, parameters, random)
    assert found == pytest.approx(max(eigenvalues), rel=1e-3)


@pytest.mark.parametrize("outcomes", [(True, False), (False,), ()])
def test_script_ends_with_an_error_unless_all_claims_hold(outcomes, tmp_path):
    def experiment(options, claims):
        for holds in outcomes:
            claims.check("a claim", holds, "a number")
        return Figure()

    assert load("common").main("example.py", "", experiment, ["--output", str(tmp_path)]) == 1


def test_readme_shows_every_script():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"{script}.py" in text
        assert f"plots/{script}.png" in text
        assert (FOLDER / "plots" / f"{script}.png").stat().st_size < 100_000
