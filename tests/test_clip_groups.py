"""Clipping by groups: what counts and isn't scaled, and a norm and a threshold for each group."""

import math

import pytest
import torch
from torch import nn

import fastnorm
from helpers.syncs import Syncs

pytestmark = pytest.mark.usefixtures("users_backend")
inf, nan = math.inf, math.nan
NAMES = ("embedding.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "head.weight")


@pytest.fixture
def users_backend():
    with fastnorm.use("native" if fastnorm.backend.statuses()["native"].available else "reference"):
        yield


def make() -> nn.Module:
    """Gradients of norm 6 to 60, but for one parameter that has none."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(7, 4), nn.Linear(4, 7)
    model.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    for place, (name, p) in enumerate(model.named_parameters()):
        p.grad = torch.randn_like(p) * 3 * (place + 1) if name != "head.bias" else None
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {*NAMES}
    return model


def grads_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clipped(grads, max_norm, norm_type=2.0, scaled=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(stock's norm, the gradients after it), scaled: the names of those that are."""
    total = nn.utils.get_total_norm(list(grads.values()), norm_type)
    factor = min(max_norm / (total.item() + 1e-6), 1)
    return total, {name: g * factor if scaled is None or name in scaled else g for name, g in grads.items()}


def check(model, expected):
    found = grads_of(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=2e-6, atol=1e-7, msg=name)


EXEMPT = {
    "name": ("blocks.0", {"blocks.0.weight", "blocks.0.bias"}),
    "names": (["head", "blocks.1.bias"], {"head.weight", "blocks.1.bias"}),
    "pattern": ("blocks.*.weight", {"blocks.0.weight", "blocks.1.weight"}),
    "pattern of modules": ("bl*.1", {"blocks.1.weight", "blocks.1.bias"}),
    "predicate": (lambda name: name.endswith("bias"), {"blocks.0.bias", "blocks.1.bias"}),
    "predicate that fits none": (lambda name: False, set()),
    "module": (lambda model: model.blocks[1], {"blocks.1.weight", "blocks.1.bias"}),
    "parameter": (lambda model: model.head.weight, {"head.weight"}),
    "parameters": (lambda model: model.blocks.parameters(), {name for name in NAMES if "blocks" in name}),
    "mixed": (lambda model: (model.embedding, "head", model.blocks[0].bias), {NAMES[0], NAMES[2], NAMES[5]}),
    "without gradient": ("head.bias", set()),
    "all": ("*", {*NAMES}),
    "none": ((), set()),
}


@pytest.mark.parametrize("case", EXEMPT)
@pytest.mark.parametrize("norm_type", [2.0, inf])
def test_exempt_counts_and_is_not_scaled(case, norm_type):
    model = make()
    exempt, kept = EXEMPT[case]
    if callable(exempt) and "predicate" not in case:
        exempt = exempt(model)
    total, expected = clipped(grads_of(model), 1.5, norm_type, {*NAMES} - kept)
    before = grads_of(model)
    result = fastnorm.clip_grad_norm_(model.named_parameters(), 1.5, norm_type, exempt=exempt)
    torch.testing.assert_close(result, total, rtol=2e-6, atol=0)
    check(model, expected)
    assert all(torch.equal(grads_of(model)[name], before[name]) for name in kept)


def test_exempt_where_each_tensor_has_its_factor():
    model, policy, kept = make(), fastnorm.AdaGC(warmup=0, lambda_rel=1.0), {"blocks.0.weight", "blocks.0.bias"}
    fastnorm.clip_grad_norm_(model.named_parameters(), policy)  # takes each norm as it is
    before = grads_of(model)
    growths = dict(zip(NAMES, range(2, 8), strict=True))
    for name, growth in growths.items():
        model.get_parameter(name).grad *= growth
    fastnorm.clip_grad_norm_(model.named_parameters(), policy, exempt="blocks.0")
    check(model, {name: grad * growths[name] if name in kept else grad for name, grad in before.items()})


@pytest.mark.parametrize(
    ("exempt", "error", "message"),
    [
        ("tail", ValueError, "exempt: 'tail' fits none of the parameters"),
        (["head", "blocks.2"], ValueError, "exempt: 'blocks.2' fits none"),
        ("block", ValueError, "exempt: 'block' fits none"),
        (nn.Linear(2, 2), ValueError, "exempt: the Linear fits none"),
        (torch.ones(1), ValueError, "exempt: the Tensor fits none"),
        (3, TypeError, "exempt takes names, predicates on names, parameters and modules, but got int"),
        ([None], TypeError, "exempt takes names, .*, but got NoneType"),
    ],
)
def test_bad_exempt_leaves_the_gradients_alone(exempt, error, message):
    model = make()
    before = grads_of(model)
    with pytest.raises(error, match=message):
        fastnorm.clip_grad_norm_(model.named_parameters(), 0.1, exempt=exempt)
    for unnamed in ("head", lambda name: True):
        with pytest.raises(ValueError, match=r"exempt: the parameters have no names, so that .* fits none of them"):
            fastnorm.clip_grad_norm_(model.parameters(), 0.1, exempt=unnamed)
    check(model, before)


def optimizer_of(model, *entries, names=False) -> torch.optim.Optimizer:
    """Three groups: embedding, blocks, head."""
    groups = []
    for start, entry in zip(("embedding", "blocks", "head"), entries, strict=True):
        named = list(model.get_submodule(start).named_parameters(start))
        groups.append({"params": named if names else [p for _, p in named], **entry})
    return torch.optim.SGD(groups, lr=0.1)


def expected_of(model, thresholds, norm_type=2.0):
    """thresholds: by the beginning of names. (norms by it, all gradients afterwards)."""
    norms, after = {}, grads_of(model)
    for start, threshold in thresholds.items():
        part = {name: grad for name, grad in grads_of(model).items() if name.startswith(start)}
        norms[start], part = clipped(part, threshold, norm_type)
        after |= part
    return norms, after


@pytest.mark.parametrize("norm_type", [2.0, 1.0, inf, "2"])
def test_groups_of_an_optimizer(norm_type):
    for entries, max_norms in (
        (({"max_norm": 0.5}, {}, {"max_norm": 1e9}), None),
        (({}, {}, {}), [0.5, None, torch.tensor(1e9)]),
        (({"max_norm": 7.0}, {}, {}), (0.5, None, 1e9)),
        (({"max_norm": 0.5}, {"max_norm": None}, {"max_norm": 1e9}), None),
    ):
        model = make()
        norms, after = expected_of(model, {"embedding": 0.5, "head": 1e9}, float(norm_type))
        result = fastnorm.clip_grad_groups_(optimizer_of(model, *entries), max_norms, norm_type)
        assert [*result] == [0, 2] and all(norm.shape == () for norm in result.values())
        torch.testing.assert_close([*result.values()], [*norms.values()], rtol=2e-6, atol=0)
        check(model, after)


@pytest.mark.parametrize("given", ["module", "pairs", "generator", "optimizer"])
def test_groups_by_names(given):
    """The first that fits has the parameter; what none fits is left alone; "*" has the rest."""
    model = make()
    parameters = {
        "module": model,
        "pairs": list(model.named_parameters()),
        "generator": model.named_parameters(),
        "optimizer": optimizer_of(model, {}, {}, {}, names=True),
    }[given]
    norms, after = expected_of(model, {"blocks.0.weight": 0.5, "blocks.0.bias": 0.25, "blocks.1": 2.0})
    result = fastnorm.clip_grad_groups_(parameters, {"*.0.weight": 0.5, "blocks.0": 0.25, "blocks": 2.0})
    assert [*result] == ["*.0.weight", "blocks.0", "blocks"]
    torch.testing.assert_close([*result.values()], [*norms.values()], rtol=2e-6, atol=0)
    check(model, after)
    model = make()
    norms, after = expected_of(model, {"embedding": 0.5})
    rest = [grad for name, grad in grads_of(model).items() if name.startswith("blocks")]
    result = fastnorm.clip_grad_groups_(model, {"embedding": 0.5, "head": None, "*": inf}, strict=True)
    assert [*result] == ["embedding", "*"]
    torch.testing.assert_close(result["*"], nn.utils.get_total_norm(rest), rtol=2e-6, atol=0)
    check(model, after)


def test_groups_by_other_keys():
    model = make()
    biases, weights = (lambda name: name.endswith("bias")), tuple(block.weight for block in model.blocks)
    keys = {biases: 0.5, (model.embedding, "head.*"): 2.0, weights: 1.0}
    members = [{NAMES[2], NAMES[4]}, {NAMES[0], NAMES[5]}, {NAMES[1], NAMES[3]}]
    after, norms = {}, []
    for names, threshold in zip(members, keys.values(), strict=True):
        norm, part = clipped({name: grad for name, grad in grads_of(model).items() if name in names}, threshold)
        norms.append(norm)
        after |= part
    result = fastnorm.clip_grad_groups_(model, keys, strict=True)
    torch.testing.assert_close([*result.values()], norms, rtol=2e-6, atol=0)
    check(model, after)
    model = make()
    norms, after = expected_of(model, {"embedding": 0.5})
    fastnorm.clip_grad_groups_(model.parameters(), {model.embedding: 0.5})  # these need no names
    check(model, after)


def test_a_group_without_gradients_has_the_norm_zero():
    model = make()
    before = grads_of(model)
    assert fastnorm.clip_grad_groups_(model, {"head.bias": 1.0}) == {"head.bias": 0}
    assert fastnorm.clip_grad_groups_([], {"head.bias": 1.0}) == {"head.bias": 0}
    assert fastnorm.clip_grad_groups_(nn.ReLU(), {}) == {}
    check(model, before)


def test_policies_of_groups_decide_as_alone():
    """Each learns from its own group."""
    grouped = {"embedding": fastnorm.ZClip(warmup=2), "blocks": fastnorm.AdaGC(warmup=1), "*": 3.0}
    alone = {"embedding": fastnorm.ZClip(warmup=2), "blocks": fastnorm.AdaGC(warmup=1), "head": 3.0}
    together, apart = make(), make()
    for step in range(6):
        for model in (together, apart):
            for name, p in make().named_parameters():
                model.get_parameter(name).grad = None if p.grad is None else p.grad * (1 + step % 3 + 9 * (step == 5))
        result = fastnorm.clip_grad_groups_(together, grouped)
        norms = [
            fastnorm.clip_grad_norm_([(n, p) for n, p in apart.named_parameters() if n.startswith(start)], threshold)
            for start, threshold in alone.items()
        ]
        assert all(map(torch.equal, result.values(), norms))
        assert all(map(torch.equal, grads_of(together).values(), grads_of(apart).values()))
    assert grouped["embedding"].clipped_share > 0 and grouped["blocks"].clipped_share > 0
    assert grouped["embedding"].threshold == alone["embedding"].threshold


def test_the_host_does_not_wait():
    model = make()
    with Syncs() as syncs:
        fastnorm.clip_grad_groups_(model, {"embedding": 0.5, "blocks": fastnorm.ZClip(), "*": 1.0})
        fastnorm.clip_grad_norm_(model.named_parameters(), 0.5, exempt="blocks")
    assert syncs.count == 0


POLICY = fastnorm.ZClip()
BAD = {
    "a name": (None, {"tail": 1.0}, ValueError, "max_norms: 'tail' fits none of the parameters"),
    "one of two": (None, {("head", "tail"): 1.0}, ValueError, "max_norms: 'tail' fits none"),
    "a predicate": (None, {str.isupper: 1.0}, ValueError, "max_norms: .*isupper.* fits none of the parameters"),
    "all taken": (None, {"*": 1.0, "head": 0.5}, ValueError, "'head' fits only parameters that earlier groups have"),
    "a key": (None, {3: 1.0}, TypeError, "max_norms takes names, .*, but got int"),
    "a threshold": (None, {"head": 0.1, "blocks": "low"}, TypeError, "'blocks' must be a number or a ClipPolicy.*low"),
    "two numbers": (None, {"head": torch.ones(2)}, TypeError, "'head' must be a number or a ClipPolicy"),
    "a class": (None, {"head": 0.1, "*": fastnorm.ZClip}, TypeError, r"'\*' must .* is the class ZClip: create one"),
    "one policy": (None, {"head": POLICY, "blocks": POLICY}, ValueError, "'head' and 'blocks' have one policy"),
    "a skip": (None, {"head": 0.1, "blocks": fastnorm.SpikeSkip()}, TypeError, "clip_grad_norm_in_optimizer"),
    "a sequence": (None, [1.0], TypeError, "a mapping from .* to thresholds, or parameters an optimizer, but got list"),
    "nothing": (None, None, TypeError, "or parameters an optimizer, but got NoneType"),
    "no names": ("parameters", {"head": 1.0}, ValueError, "max_norms: the parameters have no names, so that 'head'"),
    "twice": ("twice", {"*": 1.0}, ValueError, "parameters: head.weight and tied.weight are one tensor"),
    "twice by one name": ("again", {"*": 1.0}, ValueError, "parameters: head.weight and head.weight are one tensor"),
    "a class in a sequence": ("optimizer", [1.0, fastnorm.AdaGC, None], TypeError, r"the class AdaGC: create one"),
    "too few": ("optimizer", [1.0], ValueError, "max_norms has 1 thresholds, but the optimizer has 3 groups"),
    "no entries": ("optimizer", None, ValueError, 'no group of the optimizer has a "max_norm"'),
    "a number": ("optimizer", 1.0, TypeError, "a threshold for each of the optimizer's groups.*but got float"),
    "a string": ("optimizer", "111", TypeError, "but got str"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_groups_leave_the_gradients_alone(case):
    given, max_norms, error, message = BAD[case]
    model = make()
    head = model.head.weight
    parameters = {
        None: lambda: model,
        "parameters": model.parameters,
        "twice": lambda: [("head.weight", head), ("tied.weight", head)],
        "again": lambda: [("head.weight", head)] * 2,
        "optimizer": lambda: optimizer_of(model, {}, {}, {}),
    }[given]()
    before = grads_of(model)
    with pytest.raises(error, match=message):
        fastnorm.clip_grad_groups_(parameters, max_norms)
    check(model, before)


def test_strict_names_what_is_in_no_group():
    model = make()
    before = grads_of(model)
    with pytest.raises(ValueError, match=r"strict: no group .* has embedding\.weight, head\.weight, head\.bias$"):
        fastnorm.clip_grad_groups_(model, {"blocks": 0.1}, strict=True)
    optimizer = optimizer_of(model, {"max_norm": 0.1}, {}, {"max_norm": None})
    with pytest.raises(ValueError, match=r"has parameters\[1\], parameters\[2\], parameters\[3\], parameters\[4\]$"):
        fastnorm.clip_grad_groups_(optimizer, strict=True)
    many = [(f"p{i}", nn.Parameter(torch.ones(1))) for i in range(11)]
    with pytest.raises(ValueError, match=r"p1, .*, p8 and 2 more$"):
        fastnorm.clip_grad_groups_(many, {"p0": 1.0}, strict=True)
    check(model, before)


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_non_finite_group_raises_before_anything_is_written(bad):
    """Gradients and policies of the groups before it included."""
    model, policy = make(), fastnorm.ZClip(warmup=1)
    model.blocks[1].bias.grad[2] = bad
    before = grads_of(model)
    for thresholds in ({"embedding": 0.5, "blocks": 1.0}, {"embedding": policy, "blocks": fastnorm.AdaGC()}):
        with pytest.raises(RuntimeError, match=r"is non-finite.* is blocks\.1\.bias$"):
            fastnorm.clip_grad_groups_(model, thresholds, error_if_nonfinite=True)
        after = grads_of(model)
        assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in NAMES)
    assert policy.steps == 0
    with pytest.raises(RuntimeError, match=r"is parameters\[4\]$"):
        fastnorm.clip_grad_groups_(optimizer_of(model, {}, {}, {}), [0.5, 1.0, None], error_if_nonfinite=True)
    norms = fastnorm.clip_grad_groups_(model, {"embedding": 0.5, "blocks": 1.0})
    assert norms["embedding"].isfinite() and not norms["blocks"].isfinite()
    torch.testing.assert_close(model.embedding.weight.grad.norm(), torch.tensor(0.5))
