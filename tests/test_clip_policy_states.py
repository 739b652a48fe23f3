"""The state of clip policies: checkpoints, copies, lists that don't fit it, and the constants."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fastnorm
from fastnorm.clip import policy_base
from helpers.backends import on_a_card_too
from helpers.clipping import inf, nan, outcome, parameters_with
from helpers.policies import EVERY, SHAPES, WRITING, apply, close, deferred, recorded


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def restored(policy, state):
    twin = EVERY[policy]()
    twin.load_state_dict(state)
    return twin


@on_a_card_too
@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_goes_on_with_the_same_bits(name, served_by):
    policy = EVERY[name]()
    lists = list(recorded(60))
    for grads in lists[:30]:
        apply(policy, grads, named=True)
    others = {
        "file": restored(name, through_a_file(policy.state_dict())),
        "copy": copy.copy(policy),
        "deepcopy": copy.deepcopy(policy),
        "pickle": pickle.loads(pickle.dumps(policy)),
    }
    for grads in lists[30:]:
        expected = apply(policy, grads, named=True)
        for how, other in others.items():
            found = apply(other, grads, named=True)
            assert all(map(torch.equal, map(torch.nan_to_num, found), map(torch.nan_to_num, expected))), how
            assert other.threshold == policy.threshold
            assert other.steps == policy.steps and other.skipped == policy.skipped


@pytest.mark.parametrize("name", EVERY)
def test_a_state_from_before_the_first_call(name, served_by):
    first, policy = EVERY[name](), EVERY[name]()
    grads = next(recorded(1))
    apply(policy, grads)
    assert policy.steps == 1
    policy.load_state_dict(through_a_file(first.state_dict()))
    assert policy.steps == 0 and policy.threshold == inf and policy.clipped_share == 0
    apply(policy, grads)
    policy.reset()
    assert policy.steps == 0
    other = [torch.ones(5, dtype=torch.float64)]
    apply(policy, other)
    assert policy.steps == 1


def test_a_state_is_loaded_in_place(served_by):
    """So that a CUDA graph that has its address goes on with it."""
    policy = fastnorm.ZClip(warmup=2)
    for grads in recorded(5):
        apply(policy, grads)
    early, address = policy.state_dict(), policy._memory.state.data_ptr()
    for grads in recorded(5):
        apply(policy, grads)
    assert policy.steps == 10 and early["state"][5] == 5, "a copy"
    policy.load_state_dict(early)
    assert policy.steps == 5
    apply(policy, next(recorded(1)))
    assert policy._memory.state.data_ptr() == address and policy.steps == 6 and early["state"][5] == 5


def test_a_full_history_grows_after_loading(served_by):
    policy = fastnorm.AutoClip(0.0)
    state = torch.tensor([3.0, 0, 0, 0, 1, 3, 0, 0, 1, 2, 3], dtype=torch.float64)
    policy.load_state_dict({"policy": "AutoClip", "state": state, "norm_type": 2.0})
    apply(policy, [torch.tensor(9.0)])
    assert policy.threshold == 1, "the oldest norm was overwritten"


def test_a_history_without_bound_refuses_one_that_has_lost_norms(served_by):
    """Places that were never written would count as norms of zero, and clip every gradient to zero."""
    window, everything = fastnorm.AutoClip(0.0, 3), fastnorm.AutoClip(0.0)
    for norm in (5.0, 6.0, 7.0, 8.0):
        apply(window, [torch.tensor(norm)])
        if norm == 7.0:
            everything.load_state_dict(window.state_dict())  # none lost yet
    with pytest.raises(ValueError, match=r"the last 3 of 4 norms, .* give history=3"):
        everything.load_state_dict(window.state_dict())
    apply(everything, [torch.tensor(9.0)])
    assert everything.threshold == 5


def test_states_that_do_not_fit(served_by):
    states = {}
    for name, make in EVERY.items():
        policy = make()
        apply(policy, next(recorded(1)))
        states[name] = policy.state_dict()
    zclip = fastnorm.ZClip()
    for state, error, message in (
        (states["spikeskip"], ValueError, "state_dict is not ZClip's, but SpikeSkip's"),
        ({}, ValueError, "no policy's"),
        (states["zclip"] | {"state": torch.zeros(9)}, ValueError, r"shape \(8,\) for ZClip\(.*, but has \(9,\)"),
        (states["zclip"] | {"state": torch.zeros(8, 1)}, ValueError, r"has \(8, 1\)"),
        (states["zclip"] | {"state": [0.0] * 8}, TypeError, "state must be a floating-point tensor, but is list"),
        (states["zclip"] | {"state": torch.zeros(8).long()}, TypeError, "but is torch.int64"),
        ({"policy": "ZClip", "state": torch.zeros(8)}, ValueError, "lacks norm_type"),
    ):
        with pytest.raises(error, match=message):
            zclip.load_state_dict(state)
    assert zclip.steps == 0
    with pytest.raises(ValueError, match=r"shape \(15,\)"):
        fastnorm.AutoClip(history=7).load_state_dict(states["autoclip"])
    with pytest.raises(ValueError, match="at least 9"):
        fastnorm.AutoClip().load_state_dict(states["autoclip"] | {"state": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        fastnorm.AdaGC().load_state_dict(states["adagc"] | {"state": torch.zeros(11)})
    with pytest.raises(ValueError, match="lacks shapes"):
        fastnorm.AdaGC().load_state_dict({"policy": "AdaGC", "state": torch.zeros(12), "norm_type": 2.0})


def zeros_but(size, **values):
    state = torch.zeros(size, dtype=torch.float64)
    for place, value in values.items():
        state[int(place.removeprefix("at"))] = value
    return state


DAMAGED = {
    "none": ("zclip", None, TypeError, "state_dict must be a mapping, as .*, but is NoneType"),
    "a list": ("adagc", [1], TypeError, "but is list"),
    "a state": ("zclip", torch.zeros(8), TypeError, "but is Tensor"),
    "no state": ("zclip", {"policy": "ZClip", "norm_type": 2.0}, ValueError, "lacks state"),
    "shapes alone": ("adagc", {"policy": "AdaGC", "shapes": [(3,)]}, ValueError, "lacks state, norm_type"),
    "no order": ("zclip", {"norm_type": None}, TypeError, "norm_type must be a number, but is NoneType"),
    "a word": ("zclip", {"norm_type": "two"}, TypeError, "norm_type must be a number, but is str"),
    "no order at all": ("zclip", {"norm_type": nan}, ValueError, "norm_type must be a number, but is nan"),
    "sparse": ("zclip", {"state": torch.zeros(8).to_sparse()}, TypeError, "a dense tensor .*, but is torch.sparse_coo"),
    "meta": ("zclip", {"state": torch.zeros(8, device="meta")}, TypeError, "with values, but is torch.strided on meta"),
    "no shapes": ("adagc", {"shapes": None}, TypeError, "shapes must be a list of tuples of integers"),
    "sizes": ("adagc", {"shapes": [3, 7, 1, 5]}, TypeError, "shapes must be a list of tuples of integers"),
    "half a size": ("adagc", {"shapes": [(1.5,)] * 4}, TypeError, "shapes must be a list of tuples of integers"),
    "a truth": ("adagc", {"shapes": [(True,)] * 4}, TypeError, "shapes must be a list of tuples of integers"),
    "nested": ("adagc", {"shapes": [((3,),)] * 4}, TypeError, "shapes must be a list of tuples of integers"),
    "below 0": ("adagc", {"shapes": [(3, -1)] * 4}, ValueError, r"those of tensors, but one is \(3, -1\)"),
    "no int64": ("adagc", {"shapes": [(0, 2**63)] * 4}, ValueError, "shapes must be those of tensors"),
    "too many": ("adagc", {"shapes": [(2**40, 2**40)] * 4}, ValueError, "shapes must be those of tensors"),
    "one name": ("adagc", {"names": "abcd"}, TypeError, "names must be a list of strings"),
    "numbers": ("adagc", {"names": [0, 1, 2, 3]}, TypeError, "names must be a list of strings"),
    "three names": ("adagc", {"names": ["a", "b", "c"]}, ValueError, "one for each of the 4 shapes, but are 3"),
    "γ of NaN": ("adagc", {"state": zeros_but(12, at9=nan)}, ValueError, "norms that are negative or NaN"),
    "γ below 0": ("adagc", {"state": zeros_but(12, at11=-1.0)}, ValueError, "norms that are negative or NaN"),
    "history": ("autoclip", {"state": zeros_but(20, at12=inf)}, ValueError, "norms that are not finite"),
    "mean": ("spikeskip", {"state": zeros_but(8, at1=nan)}, ValueError, r"state\[1\] must be finite"),
    "variance": ("zclip", {"state": zeros_but(8, at2=inf)}, ValueError, r"state\[2\] must be finite"),
    "calls": ("zclip", {"state": zeros_but(8, at5=-1.0)}, ValueError, r"state\[5\] must be .* not negative, but is -1"),
} | {
    f"{count} norms": ("autoclip", {"state": zeros_but(20, at0=count)}, ValueError, r"state\[0\] must be a number of")
    for count in (-1.0, 0.5, nan, inf, 1e30)
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_states_change_nothing(case, served_by):
    name, wrong, error, message = DAMAGED[case]
    policy = EVERY[name]()
    for grads in recorded(2):
        apply(policy, grads)
    before = policy.state_dict()
    if isinstance(wrong, dict) and "policy" not in wrong:
        wrong = before | wrong
    with pytest.raises(error, match=message):
        policy.load_state_dict(wrong)
    after = policy.state_dict()
    assert torch.equal(after.pop("state"), before.pop("state")) and after == before


def test_a_state_moves_to_the_gradients_device():
    """Of a list that has no numbers, as a CPU has no other device."""
    policy = fastnorm.ZClip()
    policy.load_state_dict(fastnorm.ZClip().state_dict() | {"state": torch.zeros(8), "norm_type": 2.0})
    fastnorm.clip_grad_norm_(parameters_with([torch.ones(3, device="meta")]), policy)
    state = policy.state_dict()["state"]
    assert state.device.type == "meta" and state.dtype == torch.float64


@pytest.mark.parametrize("name", WRITING)
def test_a_refused_norm_changes_no_state(name, served_by):
    policy = EVERY[name]()
    lists = list(recorded(20))
    for grads in lists:
        apply(policy, grads)
    before, bad = policy.state_dict(), [torch.ones(shape) for shape in SHAPES]
    bad[1][2] = nan
    parameters = parameters_with([grad.clone() for grad in bad])
    pairs = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
    with pytest.raises(RuntimeError, match=r"is non-finite.*is layer\.1$"):
        fastnorm.clip_grad_norm_(pairs, policy, error_if_nonfinite=True)
    close([p.grad for p in parameters], bad)
    assert torch.equal(policy.state_dict()["state"], before["state"])
    twin = restored(name, before)
    total, found = outcome(fastnorm.clip_grad_norm_, lists[0], policy, error_if_nonfinite=True)
    expected, wanted = outcome(fastnorm.clip_grad_norm_, lists[0], twin)
    assert policy.steps == 21 and torch.equal(policy.state_dict()["state"], twin.state_dict()["state"])
    assert torch.equal(total, expected) and all(map(torch.equal, found, wanted))


def test_a_first_call_that_raises_leaves_no_trace(served_by):
    """The next one may be for another list, and another norm_type."""
    policy = fastnorm.AdaGC()
    for grads, norm_type, options in (
        ([torch.ones(3), torch.zeros(0)], -1.0, {}),
        ([torch.ones(2), torch.tensor([nan])], 1.0, {"error_if_nonfinite": True}),
    ):
        with pytest.raises(RuntimeError):
            fastnorm.clip_grad_norm_(parameters_with(grads), policy, norm_type, **options)
        assert policy.state_dict() == {"policy": "AdaGC"}
    fastnorm.clip_grad_norm_(parameters_with([torch.ones(5)]), policy)
    assert policy.steps == 1


@pytest.mark.parametrize("name", EVERY)
def test_a_state_outlives_inference_mode(name, served_by):
    policy, plain = EVERY[name](), EVERY[name]()
    for step, grads in enumerate(recorded(15)):
        with torch.inference_mode(step in (0, 3, 14) and name != "spikeskip"):
            apply(policy, grads)
            state = policy.state_dict()
        apply(plain, grads)
    policy.load_state_dict(state)
    apply(policy, grads)
    apply(plain, grads)
    assert policy.steps == 16 and policy.threshold == plain.threshold


def test_fake_tensors_leave_no_state():
    policy = fastnorm.AdaGC()
    for _ in range(2):
        with torch._subclasses.FakeTensorMode():
            parameters = parameters_with([torch.ones(3), torch.ones(2).bfloat16()])
            total = fastnorm.clip_grad_norm_(parameters, policy)
            assert total.shape == () and total.dtype == torch.float32
        assert policy.steps == 0
    apply(policy, next(recorded(1)))
    assert policy.steps == 1


def test_lists_without_gradients(served_by):
    for make in EVERY.values():
        policy = make()
        parameter = nn.Parameter(torch.zeros(3))
        for parameters in ([], [parameter], iter([parameter])):
            if not isinstance(policy, fastnorm.SpikeSkip):
                total = fastnorm.clip_grad_norm_(parameters, policy)
                assert total == 0 and total.shape == ()
        optimizer = torch.optim.SGD([parameter], fused=True)
        if not isinstance(policy, fastnorm.AdaGC):
            assert fastnorm.clip_grad_norm_in_optimizer(optimizer, policy) == 0
        assert policy.steps == 0 and policy.state_dict() == {"policy": type(policy).__name__}


def test_lists_that_the_state_was_not_made_for(served_by):
    adagc = fastnorm.AdaGC()
    fastnorm.clip_grad_norm_([("a", p) if i else ("b", p) for i, p in enumerate(parameters_with(next(recorded(1))))],
                             adagc)  # fmt: skip
    ones = [torch.ones(shape) for shape in SHAPES]
    for parameters, message in (
        (parameters_with(ones[:3]), r"state is of 4 gradients, but got 3.*reset\(\)"),
        (parameters_with(ones[::-1]), r"gradient 0 with the shape \(3, 4\), but it has \(5, 2\).*reset\(\)"),
        ([("c", p) for p in parameters_with(ones)], r"is of b, where the list now has c.*reset\(\)"),
        (list(zip("baaa", parameters_with([*ones[:3], torch.ones(9)]), strict=True)), r"of a with the shape \(5, 2\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fastnorm.clip_grad_norm_(parameters, adagc)
    fastnorm.clip_grad_norm_(parameters_with(ones), adagc)
    assert adagc.steps == 2
    adagc.reset()
    fastnorm.clip_grad_norm_(parameters_with(ones[:3]), adagc)
    for make in (fastnorm.ZClip, fastnorm.AutoClip, fastnorm.AdaGC):
        policy = make()
        fastnorm.clip_grad_norm_(parameters_with(ones), policy)
        with pytest.raises(RuntimeError, match=r"norms of order 2\.0, but got norm_type=1\.0.*reset\(\)"):
            fastnorm.clip_grad_norm_(parameters_with(ones), policy, 1.0)
        with pytest.raises(RuntimeError, match=r"state is on cpu, but the first gradient is on meta.*reset\(\)"):
            fastnorm.clip_grad_norm_(parameters_with([g.to("meta") for g in ones]), policy)
        assert policy.steps == 1


def test_captures_are_refused_where_a_graph_could_not_replay(served_by, monkeypatch):
    policy, growing = fastnorm.ZClip(), fastnorm.AutoClip()
    apply(growing, next(recorded(1)))
    monkeypatch.setattr(policy_base, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="ZClip makes its state at the first call: call it once before the capture"):
        apply(policy, next(recorded(1)))
    with pytest.raises(RuntimeError, match=r"AutoClip\(history=None\) grows.*give history a number"):
        apply(growing, next(recorded(1)))
    assert policy.steps == 0 and growing.steps == 1


def test_policies_where_they_cannot_work(served_by):
    parameters, optimizer = deferred()
    for p in parameters:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"SpikeSkip skips steps.*use fastnorm\.clip_grad_norm_in_optimizer"):
        fastnorm.clip_grad_norm_(parameters, fastnorm.SpikeSkip())
    with pytest.raises(TypeError, match=r"AdaGC.*factor of its own.*use fastnorm\.clip_grad_norm_"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, fastnorm.AdaGC())
    assert not hasattr(optimizer, "grad_scale")
    for clip, given in ((fastnorm.clip_grad_norm_, parameters), (fastnorm.clip_grad_norm_in_optimizer, optimizer)):
        with pytest.raises(TypeError, match=r"max_norm .* is the class ZClip: create one .*fastnorm\.ZClip\(\)"):
            clip(given, fastnorm.ZClip)
        with pytest.raises(TypeError, match=r"class ClipPolicy\. .* ZClip, AutoClip, AdaGC and SpikeSkip: create"):
            clip(given, fastnorm.ClipPolicy)
    with pytest.raises(TypeError, match="ClipPolicy is the base of"):
        fastnorm.ClipPolicy()
    for policy in (fastnorm.ZClip(), fastnorm.ZClip):
        with pytest.raises(TypeError, match=r"max_norm must be a number, but is ZClip: .*fastnorm\.clip_grad_norm_"):
            fastnorm.clip_grads_with_norm_(parameters, policy, torch.tensor(1.0))
        with pytest.raises(TypeError, match="clip_value must be a number, but is ZClip"):
            fastnorm.clip_grad_value_(parameters, policy)
    policy = fastnorm.ZClip()
    with pytest.raises(AttributeError, match="alpha"):
        policy.alpha = 0.5


BAD = [
    (fastnorm.ZClip, {"alpha": 0.0}, ValueError), (fastnorm.ZClip, {"alpha": 1.1}, ValueError),
    (fastnorm.ZClip, {"alpha": nan}, ValueError), (fastnorm.ZClip, {"alpha": "0.9"}, TypeError),
    (fastnorm.ZClip, {"z_threshold": 0}, ValueError), (fastnorm.ZClip, {"z_threshold": inf}, ValueError),
    (fastnorm.ZClip, {"warmup": 0}, ValueError), (fastnorm.ZClip, {"warmup": 2.5}, TypeError),
    (fastnorm.ZClip, {"warmup": True}, TypeError), (fastnorm.ZClip, {"eps": 0.0}, ValueError),
    (fastnorm.ZClip, {"spikes_enter": 1}, TypeError), (fastnorm.ZClip, {"max_norm": 0.0}, ValueError),
    (fastnorm.ZClip, {"max_norm": nan}, ValueError), (fastnorm.ZClip, {"max_norm": torch.tensor(1.0)}, TypeError),
    (fastnorm.AutoClip, {"percentile": -1}, ValueError), (fastnorm.AutoClip, {"percentile": 100.5}, ValueError),
    (fastnorm.AutoClip, {"percentile": nan}, ValueError), (fastnorm.AutoClip, {"percentile": None}, TypeError),
    (fastnorm.AutoClip, {"history": 0}, ValueError), (fastnorm.AutoClip, {"history": 10.0}, TypeError),
    (fastnorm.AutoClip, {"warmup": -1}, ValueError), (fastnorm.AdaGC, {"lambda_rel": -1.0}, ValueError),
    (fastnorm.AdaGC, {"lambda_abs": nan}, ValueError), (fastnorm.AdaGC, {"beta": 2}, ValueError),
    (fastnorm.AdaGC, {"warmup": -1}, ValueError), (fastnorm.SpikeSkip, {"factor": 0.5}, ValueError),
    (fastnorm.SpikeSkip, {"beta": 0}, ValueError), (fastnorm.SpikeSkip, {"warmup": 0}, ValueError),
    (fastnorm.SpikeSkip, {"max_consecutive": 0}, ValueError), (fastnorm.SpikeSkip, {"max_consecutive": 1.5}, TypeError),
    (fastnorm.SpikeSkip, {"on_limit": "stop"}, ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "error"), BAD, ids=str)
def test_bad_constants_are_named(kind, options, error):
    with pytest.raises(error, match=rf"^{next(iter(options))} must be "):
        kind(**options)


def test_good_constants():
    assert repr(fastnorm.ZClip(0.9)).startswith("ZClip(") and "alpha=0.9" in repr(fastnorm.ZClip(0.9))
    fastnorm.AutoClip(np.float64(10), np.int64(5))
    fastnorm.AdaGC(np.float32(1.5))
    with pytest.raises(ValueError, match='on_limit="raise" needs max_consecutive'):
        fastnorm.SpikeSkip(on_limit="raise")


def test_behind_torchs_name(served_by):
    policy = fastnorm.AutoClip(0.0)
    with fastnorm.patch_torch_clip():
        for scale in (1.0, 5.0):
            parameters = parameters_with([torch.full((4,), scale)])
            nn.utils.clip_grad_norm_(parameters, policy)
            close(parameters[0].grad, torch.ones(4))
