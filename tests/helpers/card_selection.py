"""The tests with the marker `card`: what a card must show of every kernel, in the few minutes for which one is rented.

All tests of kernels would compile several times as many, which differ in nothing but a shape. Of each function's cases
a few are taken, among which is every value of every parameter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import combinations

import pytest

# in this order: the time may run out
FIRST = ("test_row_norms.py", "test_gated_norms.py", "test_rms_norm_many.py", "test_channel_norms.py",
         "test_clip_kernels.py", "test_clip_backends.py", "test_agc.py", "test_gpu.py",
         "test_gpu_large.py")  # fmt: skip
# only on a card; and every case of them
ON_A_CARD, WHOLE = ("test_gpu.py", "test_gpu_large.py"), ("test_gpu_large.py",)
# they name no backend and run on the card where there is one; the other tests in that file are about torch's optimizers
AUTOMATIC = (
    "test_deferred_clip.py::test_parameters_equal_clip_then_step",
    "test_deferred_clip.py::test_nonfinite_steps_change_nothing",
    "test_deferred_clip.py::test_the_host_waits_for_nothing",
)
# which parameter says whose kernels run; and where it says that the CUDA kernels of the clips do
BACKEND = ("device", "kernel_device", "clip_device", "clip_backend", "kernels", "served_by", "backend")
CUDA_CLIPS = {"clip_device": "native", "kernels": "native", "served_by": "card"}
LEFT_OUT = {
    "test_arguments.py": "what Python does with numbers and shapes",
    "test_autocast.py": "dtypes, which test_gpu looks at",
    "test_backend.py": "what Python chooses",
    "test_bad_input.py": "errors, which Python raises",
    "test_channel_compile.py": "torch.compile: test_gpu has Inductor",
    "test_channel_modules.py::test_autocast_gives_stocks_dtypes": "as test_autocast.py",
    "test_channel_modules.py::test_running_statistics": "what the modules pass on",
    "test_channel_modules.py::test_tracking_is_switched_off_and_on": "what the modules pass on",
    "test_channel_modules.py::test_training_evaluation_and_back": "what the modules pass on",
    "test_channel_modules.py::test_without_autograd": "what autograd records",
    "test_channel_traffic.py": "a virtual GPU counts bytes",
    "test_checkpoint.py": "what autograd saves",
    "test_clip_policies.py": "test_policy_kernels.py has their kernels, test_gpu.py their graphs",
    "test_clip_policy_states.py": "what Python keeps",
    "test_compile.py": "torch.compile: test_gpu has Inductor",
    "test_exact_zeros.py::test_groups_of_one_element": "as test_constant_channels_leave_the_bias",
    "test_gated_norms.py::test_eps_of_none_is_that_of_the_statistics": "what Python chooses",
    "test_gated_norms.py::test_modules_are_the_functionals": "what the modules pass on",
    "test_gated_norms.py::test_no_activation_is_the_default_but_silu": "defaults",
    "test_gated_norms.py::test_kernels_read_slices_of_a_projection": "what the launchers are given",
    "test_gated_norms.py::test_mistakes": "errors, which Python raises",
    "test_gated_norms.py::test_result_dtypes_and_autocast": "as test_autocast.py",
    "test_modulated_norms.py::test_chunks_are_read_in_place": "what the launchers are given",
    "test_modulated_norms.py::test_eps_of_none_is_that_of_the_statistics": "what Python chooses",
    "test_modulated_norms.py::test_eps_of_none_is_that_of_float64_statistics": "what Python chooses",
    "test_modulated_norms.py::test_fake_tensors_have_the_form_of_real_results": "shapes, which Python tells",
    "test_modulated_norms.py::test_gradcheck_and_gradgradcheck": "the formula",
    "test_modulated_norms.py::test_h_is_x_without_a_residual_and_a_gate": "what Python chooses",
    "test_modulated_norms.py::test_no_rows": "what Python chooses",
    "test_modulated_norms.py::test_only_wanted_gradients": "what autograd wants",
    "test_modulated_norms.py::test_operators_keep_to_their_schemas": "opcheck",
    "test_modulated_norms.py::test_the_module_is_the_functional": "what the modules pass on",
    "test_modulated_norms.py::test_torch_compile": "torch.compile: test_gpu has Inductor",
    "test_modulated_norms.py::test_what_is_saved": "what autograd saves",
    "test_gated_norms.py::test_what_is_saved": "what autograd saves",
    "test_heads.py::test_divisions_are_exact": "what the launchers are given",
    "test_heads.py::test_empty_inputs": "what no kernel reads",
    "test_heads.py::test_one_row_and_sizes_of_one": "what the launchers are given",
    "test_heads.py::test_rows_of_more_levels_are_copied": "what no kernel reads",
    "test_heads.py::test_the_view_itself_is_saved": "what autograd saves",
    "test_inplace_neighbours.py": "what autograd forbids",
    "test_kept_groups.py::test_what_is_moved": "a virtual GPU counts bytes",
    "test_modules.py::test_autocast": "as test_autocast.py",
    "test_modules.py::test_without_autograd": "what autograd records",
    "test_models.py::test_gated_rms_norm_against_transformers": "as test_gated_norms.py::test_llama_rounding",
    "test_opinfo.py": "torch's samples: a shape, and kernels for it, each",
    "test_policy_kernels.py::test_wrong_arguments_raise": "errors, which the host raises",
    "test_rms_norm_many.py::test_as_in_models": "a rotation as the others",
    "test_rms_norm_many.py::test_an_angle_is_taken_off_again": "a rotation as the others",
    "test_rms_norm_many.py::test_no_angle_is_the_norm_alone": "a rotation as the others",
    "test_rms_norm_many.py::test_places_of_positions": "what the launchers are given",
    "test_rms_norm_many.py::test_results_are_the_same_from_run_to_run": "as the test of batches",
    "test_rms_norm_many.py::test_strides_of_many_levels": "what no kernel reads",
    "test_rms_norm_many.py::test_tables_of_other_strides": "what the launchers are given",
    "test_rms_norm_many.py::test_weights_of_several_dtypes": "what Python does with lists",
    "test_rms_norm_many.py::test_inputs_of_several_dtypes": "what Python does with lists",
    "test_rms_norm_many.py::test_long_rows_are_not_rotated_by_triton": "an error, which the launcher raises",
    "test_rms_norm_many.py::test_no_columns": "what no kernel reads",
    "test_rms_norm_many.py::test_no_rows": "what no kernel reads",
    "test_rms_norm_many.py::test_the_kernels_get_the_views_themselves": "what the launchers are given",
    "test_rms_norm_many_calls.py": "what autograd, compilers and callers see",
    "test_traffic.py": "a virtual GPU counts bytes",
    "test_unusual_gradients.py": "what no kernel reads",
    "test_unusual_tensors.py": "what no kernel reads",
}
# each operation in each dtype, not only each somewhere
EVERY_DTYPE = ("test_row_norms.py::test_values_and_gradients", "test_channel_norms.py::test_dtypes")
# of the functions that compile most kernels for a shape: odd planes, two and five dimensions, more
# channels than a tile has, planes longer than a tile, planes that are read 16 bytes at a time
SHAPES = {
    "test_channel_norms.py::test_batch_norm_in_training": "(4, 3, 5, 5)  (17, 10)  (2, 6, 3, 4, 5)  "
    "(2, 130, 3, 3)  (1, 7, 33, 40)",
    "test_channel_norms.py::test_batch_norm_in_evaluation": "(17, 10)  (2, 130, 3, 3)  (1, 7, 33, 40)  (3, 40, 14, 14)",
    "test_channel_norms.py::test_group_norm": "(5, 10)  (1, 7, 33, 40)  (1, 20, 14, 14)",
}


def selected(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The items for a card, in the order in which they matter."""
    groups: dict[tuple[str, str, str], list[pytest.Item]] = {}
    for item in items:
        if runs_kernels(item) and not left_out(item):
            backend = next((str(parameters(item)[name]) for name in BACKEND if name in parameters(item)), "")
            groups.setdefault((item.path.name, item.originalname, backend), []).append(item)
    chosen = [item for (file, *_), group in groups.items() for item in (group if file in WHOLE else cover(group))]
    places = {item: place for place, item in enumerate(items)}
    rank = {file: place for place, file in enumerate(FIRST)}
    return sorted(chosen, key=lambda item: (rank.get(item.path.name, len(rank)), places[item]))


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def runs_kernels(item: pytest.Item) -> bool:
    """Whether kernels run on the card in this test, where there is one."""
    if item.get_closest_marker("triton") is not None or {*names_of(item)} & {*ON_A_CARD, *AUTOMATIC}:
        return True
    return any(parameters(item).get(name) == value for name, value in CUDA_CLIPS.items())


def left_out(item: pytest.Item) -> bool:
    """Hypothesis, too, draws shapes at will."""
    shapes = SHAPES.get(names_of(item)[1])
    if shapes is not None and str(parameters(item)["shape"]) not in shapes.split("  "):
        return True
    return bool({*names_of(item)} & LEFT_OUT.keys()) or getattr(item.obj, "is_hypothesis_test", False)


def names_of(item: pytest.Item) -> tuple[str, str]:
    """Of the file, and of the function in it."""
    return item.path.name, f"{item.path.name}::{item.originalname}"


def cover(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """A few of the items, with every value that any of them has: the next is always that with most that are still
    missing; of equals, with most pairs of values that are new, then with the values that were taken least."""
    has = [values_of(item) for item in items]
    has_pairs = [set(combinations(sorted(values), 2)) for values in has]
    missing, old_pairs, taken, chosen = set().union(*has), set(), Counter(), []
    while missing or not chosen:
        worth = [
            (len(values & missing), len(pairs - old_pairs), -sum(taken[value] for value in values), -i)
            for i, (values, pairs) in enumerate(zip(has, has_pairs, strict=True))
        ]
        best = worth.index(max(worth))
        chosen.append(best)
        missing -= has[best]
        old_pairs |= has_pairs[best]
        taken.update(has[best])
    return [items[i] for i in sorted(chosen)]


def values_of(item: pytest.Item) -> frozenset[tuple[str, str]]:
    """Each parameter's value; of a case, each field's, and the operation with the field's."""
    values = {}
    for name, value in parameters(item).items():
        if is_dataclass(value):
            case = {field.name: repr(getattr(value, field.name)) for field in fields(value)}
            values |= case | {f"op and {field}": f"{case['op']} {value}" for field, value in case.items()}
        else:
            values[name] = repr(value)
    if names_of(item)[1] in EVERY_DTYPE:
        values["op and dtype"] = f"{values['op']} {values['dtype']}"
    return frozenset(values.items())
