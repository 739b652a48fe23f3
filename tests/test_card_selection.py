"""`pytest -m card` has every kernel, and stays small."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastnorm import backend
from fastnorm.backend import ROW_NORMS
from helpers import card_selection
from helpers.card_selection import LEFT_OUT, SHAPES, cover, selected
from helpers.collection import TESTS, chosen

pytestmark = pytest.mark.slow

DTYPES = ("float32", "bfloat16", "float16", "float64")
# which of the selected tests, by their names, run the kernels in a file
KERNELS_IN = {
    "row_norm.py": [
        "test_values_and_gradients.*-rms_norm",
        "test_values_and_gradients.*-layer_norm",
        "add_rms_norm",
        "add_layer_norm",
        "test_every_variant.*gate first.*gated_rms_norm",
        "test_every_variant.*norm first.*gated_layer_norm",
    ],
    "row_gradients.py": ["test_values_and_gradients.*-rms_norm", "test_values_and_gradients.*-layer_norm"],
    "long_row_norm.py": ["test_long_rows.*rms_norm", "test_long_rows.*layer_norm", "test_gated_norms.*test_long_rows"],
    "rms_norm_many.py": ["test_rotations.*triton", "test_without_a_rotation.*triton", "test_dtypes.*triton"],
    "tiles.py": ["test_values_and_gradients.*triton"],
    "planes.py": ["test_batch_norm_in_training.*contiguous", "test_group_norm.*contiguous"],
    "pixels.py": ["test_batch_norm_in_training.*channels_last", "test_group_norm.*channels_last"],
    "kept_groups.py": ["test_kept_groups.*test_values.*False", "test_kept_groups.*test_values.*True"],
    "moments.py": ["test_batch_norm_in_training.*triton", "test_group_norm.*triton"],
    "multi_tensor.py": ["test_norms_of_every_kind.*triton", "test_scale_and_dup.*triton", "test_clamp.*triton"],
    "clip_policy.py": ["test_two_hundred_steps.*triton", "test_factors_as_the_reference.*triton"],
    "agc.py": ["test_adaptive_clipping.*triton", "test_long_units.*triton", "test_powers_of_long.*triton"],
    "multi_tensor.cu": ["test_norms_of_every_kind.*native", "test_scale_and_dup.*native", "test_clamp.*native"],
    "agc.cu": ["test_adaptive_clipping.*native", "test_long_units.*native"],
}
@pytest.fixture
def selection(request) -> list[tuple[str, dict[str, str]]]:
    """The names of what `pytest -m card` runs, in its order, and their parameters."""
    if backend._triton is None:
        pytest.skip("needs Triton")
    return [(name, params) for name, params, _ in chosen(request, "card")]


def test_the_selection_has_every_kernel_and_is_small(selection):
    names = [name for name, _ in selection]
    assert 300 < len(names) < 920
    folders = backend._triton.__path__[0], TESTS.parent / "csrc" / "cuda"
    sources = [path for folder in folders for path in Path(folder).iterdir() if path.is_file()]
    with_kernels = {p.name for p in sources if re.search(r"^def _\w+_kernel\(|\w+_kernel\(const", p.read_text(), re.M)}
    assert with_kernels == KERNELS_IN.keys()
    for file, patterns in KERNELS_IN.items():
        for pattern in patterns:
            assert any(re.search(pattern, name) for name in names), f"nothing for {file}: {pattern}"

    dtypes = defaultdict(set)
    for name, params in selection:
        if "dtype" in params:
            dtypes[name.partition("[")[0], params.get("op", params.get("kernels"))].add(params["dtype"][6:])
    for op in ROW_NORMS:
        assert dtypes["test_row_norms.py::test_values_and_gradients", op] == set(DTYPES)
    for op in ("batch_norm", "group_norm"):
        assert dtypes["test_channel_norms.py::test_dtypes", op] == set(DTYPES) - {"float32"}  # as all the others
    for kernels in ("native", "triton"):
        assert dtypes["test_clip_kernels.py::test_every_start_and_the_neighbours", kernels] == set(DTYPES)

    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    assert files[: len(card_selection.FIRST)] == list(card_selection.FIRST)
    for name in (*LEFT_OUT, *SHAPES, *card_selection.AUTOMATIC, *card_selection.EVERY_DTYPE):
        file, _, function = name.partition("::")
        assert f"def {function}" in (TESTS / file).read_text(), f"{name} is gone"
    for name, shapes in SHAPES.items():
        shown = {params["shape"] for other, params in selection if other.partition("[")[0] == name}
        assert shown == set(shapes.split("  ")), name


@dataclass
class Case:
    op: str
    dtype: str


class Item:
    """What the selection asks a test for."""

    def __init__(self, name: str = "test_row_norms.py::test_f", marker: str | None = "triton", obj=None, **params):
        file, _, self.originalname = name.partition("::")
        self.path, self.obj, self.callspec = Path(file), obj, SimpleNamespace(params=params)
        self.get_closest_marker = {marker: "marked"}.get


def test_a_cover_has_every_value_and_few_of_them_twice():
    items = [Item(op=op, dtype=dtype, cols=cols) for op in "ab" for dtype in "xyz" for cols in (1, 2, 3)]
    found = [tuple(i.callspec.params.values()) for i in cover(items)]
    assert len(found) == 3 and [set(values) for values in zip(*found, strict=True)] == [{*"ab"}, {*"xyz"}, {1, 2, 3}]
    assert cover(items[:1]) == items[:1] and len(cover([Item(), Item()])) == 1
    cases = [Item(case=Case(op, dtype)) for op in "ab" for dtype in "xy"]
    assert cover(cases) == cases, "each operation with the values of each field"


def test_each_backend_is_covered_and_what_needs_no_card_is_left_out():
    clips = [Item("test_agc.py::test_f", "triton" if device == "triton" else None, clip_device=device, p=p)
             for device in ("reference", "native", "triton") for p in (1, 2)]  # fmt: skip
    drawn = Item(obj=SimpleNamespace(is_hypothesis_test=True))
    late, first, only_here = Item("test_launch.py::test_f"), Item(), Item("test_gpu.py::test_f", None)
    items = [only_here, late, *clips, drawn, Item("test_compile.py::test_f"), first, Item(marker=None)]
    assert selected(items) == [first, *clips[2:], only_here, late]
