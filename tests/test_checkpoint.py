"""Selective activation checkpointing: what a policy saves of a norm is not computed again, and the gradients stay."""

from functools import partial

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from helpers.every_norm import CASES, all_between_neighbours, assert_same, everything, make_inputs

RUNS = [(case, CheckpointPolicy.MUST_SAVE, 1) for case in CASES]
RUNS += [(case, CheckpointPolicy.MUST_RECOMPUTE, 2) for case in CASES if case.endswith("norm-2x3x24")]


class Calls(TorchDispatchMode):
    """The operators of ours that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("fastnorm"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def of_ours(policy: CheckpointPolicy, _, func, *arguments, **options) -> CheckpointPolicy:
    return policy if func.namespace.startswith("fastnorm") else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("case, policy, runs", RUNS, ids=[f"{case}-{policy.name}" for case, policy, _ in RUNS])
def test_what_is_saved_runs_once(case, policy, runs, kernel_device):
    tensors = make_inputs([case], kernel_device)
    contexts = partial(create_selective_checkpoint_contexts, partial(of_ours, policy))
    with Calls() as calls:
        actual = everything(
            tensors, partial(checkpoint, all_between_neighbours, use_reentrant=False, context_fn=contexts)
        )
    backward = [name for name in calls.names if "backward" in name]
    assert len(backward) == 1 and len(calls.names) == runs + 1
    assert_same(actual, everything(tensors))
