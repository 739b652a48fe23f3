"""What a kernel's plans do, told by launches that a driver writes down: run by test_launch_plans.py in a process of its
own, where Triton is not interpreted."""

import json
import random
import sys
from dataclasses import replace

import torch
import triton

from bench import compiled, shipped
from bench.problem import CLIPS, DIRECTIONS, IMAGES, Problem
from fastnorm.triton_kernels import jit, launch, multi_tensor, planes, row_gradients

# Of what test_codegen.py compiles, so that both find it in the cache: the least and the most that a row norm does.
PROBLEMS = [
    *(Problem("{}", op, direction, "bf16", cols)
      for cols in (1024, 65536) for op in ("rms_norm", "add_layer_norm") for direction in DIRECTIONS),
    *(Problem("{}", op, direction, "bf16", None, images[0], channels_last)
      for op, images in IMAGES.items() for direction in DIRECTIONS for channels_last in (False, True)),
    *(Problem("{}", op, "", "bf16", None) for op in CLIPS),
]  # fmt: skip
STORAGES = [torch.empty(n, dtype=torch.uint8, device="meta") for n in (2**20, 2**31 - 1, 2**31, 2**32)]


class Driver(compiled.CompilingDriver):
    """Writes launches down."""

    def __init__(self, target: str):
        super().__init__(target)
        self.launches: list[list] = []

    def launcher_cls(self, source, metadata):
        def launcher(x, y, z, stream, function, packed, described, enter, leave, *arguments):
            named = [str(a) if isinstance(a, torch.dtype) else f"{a.dtype}{tuple(a.shape)}" if isinstance(
                a, torch.Tensor) else repr(a) for a in arguments]  # fmt: skip
            if enter is not None and enter.calls:
                enter(described)
            self.launches.append([x, y, z, stream, id(function), repr(packed), *named])

        return launcher


def counted(problem: Problem, driver: Driver) -> tuple[list, int]:
    """The launches of a call, and how many of them went through Triton's JIT."""
    driver.launches.clear()
    through = 0

    def run(self, *arguments, **options):
        nonlocal through
        through += 1
        return original(self, *arguments, **options)

    original, triton.JITFunction.run = triton.JITFunction.run, run
    try:
        shipped.call(problem)
    finally:
        triton.JITFunction.run = original
    return list(driver.launches), through


def repeated(target: str) -> list[dict]:
    """Each problem's launches, the second time without the JIT; and again with a profiler's hook."""
    triton.runtime.driver.set_active(driver := Driver(target))
    found, seen = [], []
    for problem in (replace(p, target=target) for p in PROBLEMS[:: 1 if target == "sm_90" else 6]):
        first, _ = counted(problem, driver)
        second, through = counted(problem, driver)
        hook = lambda described: seen.append(described)  # noqa: E731
        triton.knobs.runtime.launch_enter_hook.add(hook)
        third, watched = counted(problem, driver)
        triton.knobs.runtime.launch_enter_hook.remove(hook)
        found.append({"problem": str(problem), "launches": len(first), "same": first == second == third,
                      "through": through, "watched": watched, "seen": len(seen)})  # fmt: skip
        seen.clear()
    return found


def arguments_of(kernel, choose: random.Random) -> list:
    """Something for each parameter that is no constexpr."""

    def tensor():
        offset = choose.choice((0, 1, 4, 8, 16))
        dtype = choose.choice((torch.bfloat16, torch.float32, torch.float64))
        storage = choose.choice(STORAGES)
        return storage[offset * dtype.itemsize :][: 64 * dtype.itemsize].view(dtype)

    def integer():
        return choose.choice((0, 1, 2, 16, 48, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, -1, -16, 2**40, 2**63 - 1))

    values = []
    for parameter in kernel.params:
        if parameter.is_constexpr:
            continue
        if parameter.name.endswith("_ptr"):
            values.append(choose.choice((None, tensor(), tensor(), tensor())))
        else:
            is_tuple = parameter.name.endswith("strides")
            values.append(tuple(integer() for _ in range(3)) if is_tuple else integer())
    return values


def agreements(target: str, tries: int) -> dict:
    """Lists with the same traits, and those of them that Triton specialises alike."""
    triton.runtime.driver.set_active(Driver(target))
    choose, is_hip = random.Random(0), launch.backend() == "hip"
    kernels = [row_gradients._row_norm_backward_kernel, multi_tensor._norm_kernel, planes._planes_normalize_kernel]
    tried, groups = 0, {}
    for _ in range(tries):
        kernel = choose.choice(kernels)
        arguments = arguments_of(kernel, choose)
        # few kinds of argument, so that lists meet
        if choose.random() < 0.8:
            arguments = [a if i == choose.randrange(len(arguments)) else previous(kernel, i, a)
                         for i, a in enumerate(arguments)]  # fmt: skip
        binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()][4]
        constants = {p.name: 1 for p in kernel.params if p.is_constexpr}
        _, specialization, _ = binder(*arguments, **constants)
        key = kernel.fn.__name__, str(jit.traits(tuple(arguments), is_hip))
        groups.setdefault(key, set()).add(str(specialization))
        tried += 1
    distinct = {(kernel, s) for (kernel, _), found in groups.items() for s in found}
    return {"tried": tried, "groups": len(groups), "distinct": len(distinct),
            "mixed": [sorted(found) for found in groups.values() if len(found) > 1][:3]}  # fmt: skip


_previous: dict[tuple, object] = {}


def previous(kernel, i: int, otherwise):
    """What this parameter had at first."""
    return _previous.setdefault((kernel.fn.__name__, i), otherwise)


if __name__ == "__main__":
    print(json.dumps({"repeated": repeated(sys.argv[1]), "agreements": agreements(sys.argv[1], 3000)}))
