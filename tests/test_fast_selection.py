"""`make test-fast` has every operation on every backend in every dtype, and stays small."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastnorm.backend import ROW_NORMS
from helpers.collection import TESTS, chosen
from helpers.fast_selection import cell_of, selected
from helpers.norms import DTYPES

pytest.importorskip("fastnorm.native", exc_type=ImportError)
pytestmark = pytest.mark.slow

BACKENDS = ("reference", "native", "triton")
# the tests of the clips' kernels in each dtype, which have one function for each operation
CLIPS_IN = {
    "reference": ("test_agc.py::test_other_dtypes_round_once",),
    "native": (
        "test_clip_native.py::test_every_size_against_float64",
        "test_clip_native.py::test_scaling_and_clamping_every_size",
        "test_clip_native.py::test_adaptive_clipping_by_the_rule",
    ),
    "triton": (
        "test_clip_kernels.py::test_norms_of_every_dtype",
        "test_clip_kernels.py::test_every_start_and_the_neighbours",
        "test_agc.py::test_other_dtypes_round_once",
    ),
}


def test_the_selection_has_every_operation_backend_and_dtype(request):
    found = chosen(request, "fast")
    cells = {cell for _, _, cell in found}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert {*product((*ROW_NORMS, "batch_norm", "group_norm"), BACKENDS, dtypes)} <= cells
    evaluated = {cell[1] for name, _, cell in found if "test_batch_norm_in_evaluation" in name}
    assert evaluated == {cell[1] for cell in cells if cell[0] == "SyncBatchNorm"} - {""} == {*BACKENDS}
    for name, functions in CLIPS_IN.items():
        for function in functions:
            shown = {dtype for test, _, (_, backend, dtype) in found
                     if test.partition("[")[0] == function and backend in ("", name)}  # fmt: skip
            assert shown >= {*dtypes} - {"float32"}, f"{function} on {name}"  # as all the others


def test_the_selection_has_most_files_and_is_small(request):
    names = [name for name, *_ in chosen(request, "fast")]
    files = {name.partition("::")[0] for name in names}
    assert len(files) > 0.6 * len(list(TESTS.glob("test_*.py"))), "a file that is slow, or that can't be collected?"
    assert len(names) < 3120


class Item:
    """What the selection asks a test for."""

    def __init__(self, function: str = "test_f", file: str = "test_row_norms.py", marker: str = "", **params):
        self.path, self.originalname, self.callspec = Path(file), function, SimpleNamespace(params=params)
        self.get_closest_marker = {marker: "marked"}.get


def test_a_case_of_each_cell_is_taken_and_the_others_values_vary():
    items = [Item(op=op, device=device, shape=shape) for op in "ab" for device in "xy" for shape in (1, 2, 3)]
    found = [(*cell_of(item)[:2], item.callspec.params["shape"]) for item in selected(items)]
    assert found == [("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("b", "y", 1)]
    plain, other = Item(), Item("test_g")
    left = [Item(marker="slow"), Item(file="test_bench.py")]
    assert selected([plain, *left, other]) == [plain, other]
