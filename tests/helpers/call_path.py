"""What C++ launches by its plans, told by a launcher that writes it down: run by test_call_path.py in a process of its
own, where Triton is not interpreted, on a driver that compiles for a card and runs nothing."""

import ctypes
import json
import os
import random
import sys
import threading

import torch
import triton
from torch import Tensor

import fastnorm
from bench import compiled
from fastnorm import backend
from fastnorm.triton_kernels import jit, plans

_C = backend._native._C
STREAM = 7
ADDRESSES = ctypes.POINTER(ctypes.c_void_p)
DRIVER_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ADDRESSES, ctypes.c_void_p
)
SIZES = {"i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64}


class Driver(compiled.CompilingDriver):
    """Keeps what Triton loads, by its handle, and writes down what Triton's JIT launches."""

    def __init__(self, target: str):
        super().__init__(target)
        self.loaded, self.made, self.launches = {}, [], []
        load = self.utils.load_binary

        def load_binary(*arguments):
            found = load(*arguments)
            self.loaded[found[1]] = self.made[-1]
            return found

        self.utils.load_binary = load_binary

    def get_current_stream(self, device) -> int:
        return STREAM

    def launcher_cls(self, source, metadata):
        types = list(_flat_types(source.signature.values()))

        def launch(x, y, z, stream, function, packed, described, enter, leave, *arguments):
            values = [a.data_ptr() if isinstance(a, Tensor) else a for a in _flat(arguments, source.signature.values())]
            threads = metadata.num_warps * self.target.warp_size
            self.launches.append([function, [x, y, z], threads, metadata.shared, stream, values])

        self.made.append(types)
        return launch


def _flat_types(types):
    for kind in types:
        if isinstance(kind, tuple):
            yield from _flat_types(kind)
        elif kind != "constexpr":
            yield kind


def _flat(arguments, types):
    for argument, kind in zip(arguments, types, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(argument, kind)
        elif kind != "constexpr":
            yield argument


def start(target: str) -> tuple[Driver, list]:
    """The driver, and the list of what C++ launches: as the driver's function is given it."""
    triton.runtime.driver.set_active(driver := Driver(target))
    written: list = []

    def launch(function, x, y, z, threads, threads_y, threads_z, shared, stream, parameters, extra):
        assert (threads_y, threads_z, extra) == (1, 1, None)
        kinds = driver.loaded[function]
        values = [
            ctypes.cast(parameters[i], ctypes.POINTER(SIZES.get(kind, ctypes.c_uint64)))[0]
            for i, kind in enumerate(kinds)
        ]
        scratch = [ctypes.cast(parameters[len(kinds) + i], ctypes.POINTER(ctypes.c_uint64))[0] for i in range(2)]
        assert scratch == [0, 0]
        written.append([function, [x, y, z], threads, shared, stream, values])
        return start.status

    start.callback, start.status = DRIVER_LAUNCH(launch), 0  # must outlive the calls
    plans.launcher = ctypes.cast(start.callback, ctypes.c_void_p).value
    plans.CALLS_BEFORE = 0
    return driver, written


def named(launches: list, tensors: list[Tensor]) -> list:
    """Launches with addresses in the tensors of a call as places there; what else looks like an address is new."""

    def name(value: int):
        for tensor in tensors:
            begin = tensor.untyped_storage().data_ptr()
            if begin <= value < begin + tensor.untyped_storage().nbytes():
                return f"{tensor.data_ptr()}+{value - tensor.data_ptr()}"
        return "new" if value > 2**40 else value

    return [[*launch[:-1], [name(value) for value in launch[-1]]] for launch in launches]


PLACES = random.Random(1)  # what a seed leaves open: alignment, and which tensors share memory


def some_rows(choose: random.Random, dtype: torch.dtype) -> Tensor:
    """A few shapes, strides and alignments, so that calls meet."""
    rows, cols = choose.choice((1, 3, 16)), choose.choice((5, 64, 1000))
    offset = PLACES.choice((0, 0, 1))
    kind = choose.choice(("plain", "plain", "padded", "columns", "expanded", "deep"))
    if kind == "padded":
        return torch.zeros(rows, cols + 24, dtype=dtype)[:, offset : offset + cols]
    if kind == "columns":
        return torch.zeros(cols, rows, dtype=dtype).T
    if kind == "expanded":
        return torch.zeros(1, cols, dtype=dtype).expand(rows, cols)
    shape = (2, rows, cols) if kind == "deep" else (rows, cols)
    flat = torch.zeros(shape.count(2) * 2 * rows * cols + rows * cols + offset, dtype=dtype)
    return flat[offset:][: (2 if kind == "deep" else 1) * rows * cols].view(shape)


def like(x: Tensor) -> Tensor:
    """x itself, or another tensor of its strides."""
    return PLACES.choice((x, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)))


def row_norm_arguments(choose: random.Random) -> tuple[str, tuple]:
    dtype = choose.choice((torch.float32, torch.bfloat16, torch.float64))
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    x, cols_of = some_rows(choose, dtype), lambda t: t.shape[-1]
    flat = torch.zeros(2 * cols_of(x) + 1, dtype=choose.choice((torch.float32, dtype)))[PLACES.choice((0, 1)) :]
    # neighbours in one buffer, as FSDP lays parameters out
    weight, bias = (choose.choice((None, flat[i * cols_of(x) : (i + 1) * cols_of(x)])) for i in range(2))
    residual, gate = choose.choice(((None, None), (like(x), None), (None, like(x))))
    groups = 1 if gate is None or cols_of(x) % 4 else choose.choice((1, 4))
    subtract_mean, zero_centered = choose.random() < 0.5, choose.random() < 0.5
    silu, norm_before_gate = choose.random() < 0.5, choose.random() < 0.5
    cast = None if subtract_mean else choose.choice((None, dtype))
    if choose.random() < 0.5:
        return "row_norm_forward", (
            x, residual, gate, None, 1, groups, 1, weight, bias, choose.choice((1e-5, 1e-6)), subtract_mean,
            zero_centered, silu, norm_before_gate, cast, dtype, None if residual is None else dtype,
        )  # fmt: skip
    rows = groups * x.numel() // x.shape[-1]
    mean, rstd = torch.zeros(rows, dtype=stat) if subtract_mean else None, torch.ones(rows, dtype=stat)
    dy = like(x)
    dh = None if gate is not None else choose.choice((None, like(dy)))
    dtypes = [choose.choice((None, torch.float32)) for _ in range(2)]
    dtypes = [d if p is not None else None for d, p in zip(dtypes, (weight, bias), strict=True)]
    return "row_norm_backward", (
        dy, dh, x, None, gate, None, 1, groups, 1, weight, bias, mean, rstd, zero_centered, silu, norm_before_gate,
        cast, dtype, None, *dtypes,
    )  # fmt: skip


def channel_norm_arguments(choose: random.Random) -> tuple[str, tuple]:
    dtype = choose.choice((torch.float32, torch.bfloat16))
    layout = choose.choice((torch.contiguous_format, torch.channels_last))
    shape = (2, choose.choice((8, 24)), choose.choice((1, 5)), choose.choice((4, 7)))
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    x = choose.choice((x, x[:, :, :, 1:], x[..., : shape[3] - 1]))
    c = shape[1]
    weight, mean, rstd = (torch.ones(c) for _ in range(3))
    fused = choose.random() < 0.5
    if choose.random() < 0.5:
        statistic = torch.ones(2, 4)
        forward = x, 4, weight, choose.choice((None, weight)), 1e-5, layout, fused, dtype
        backward = x, x, 4, weight, None, statistic, statistic, layout, fused, torch.float32, None
        return choose.choice((("group_norm_forward", forward), ("group_norm_backward", backward)))
    forward = x, choose.choice((None, like(x))), weight, None, mean, rstd, None, 0.1, 1e-5, layout, fused, dtype
    backward = x, None, x, weight, mean, rstd, choose.random() < 0.5, layout, None, torch.float32, torch.float32
    return choose.choice((("batch_norm_forward", forward), ("batch_norm_backward", backward)))


def list_arguments(choose: random.Random) -> tuple[str, tuple]:
    """RMSNorm of q and k, apart or parts of one tensor, or of rows that are all in one place, rotated or not."""
    dtype, cols, heads = choose.choice((torch.float32, torch.bfloat16)), 64, choose.choice((1, 3))
    kind = choose.choice(("packed", "packed", "expanded", "apart", "one"))
    apart = [torch.zeros(2, 3, n, cols, dtype=dtype) for n in (heads, 1)]
    packed = torch.zeros(2, 3, heads + 2, cols, dtype=dtype)
    expanded = torch.zeros(1, 3, 1, cols, dtype=dtype).expand(2, 3, heads, cols)
    xs = {"packed": [packed[:, :, :heads], packed[:, :, heads : heads + 1]], "one": apart[:1],
          "expanded": [expanded, expanded], "apart": apart}[kind]  # fmt: skip
    weight = torch.ones(cols)
    weights = [choose.choice((None, weight, PLACES.choice((weight, torch.ones(cols))))) for _ in xs]
    table = torch.zeros(3, 1, 32)
    tables = [table.expand(*x.shape[:3], 32) for x in xs] if choose.random() < 0.5 else []
    rotation = tables, tables, choose.random() < 0.5
    if choose.random() < 0.5:
        eps = choose.choice((1e-3, 1e-4))  # not `special`'s: Triton would take the kernels that its driver loaded
        return "rms_norm_many_forward", (xs, weights, *rotation, eps, False, None, torch.float32)
    grads = [PLACES.choice((x, torch.zeros(x.shape, dtype=dtype))) for x in xs]
    rstds = [torch.ones(x.numel() // cols) for x in xs]
    wanted = [weight is not None for weight in weights]
    return "rms_norm_many_backward", (grads, xs, weights, rstds, *rotation, False, None, wanted)


def compared(driver: Driver, written: list, tries: int, kinds: list) -> dict:
    """Calls at random: what C++ launches, and what Triton's JIT would."""
    choose, different, made, reused = random.Random(0), [], 0, 0
    seeds = range(tries // 3)  # a call that comes again finds other memory
    for seed in choose.choices(seeds, k=tries):
        name, arguments = kinds[seed % len(kinds)](random.Random(seed))
        tensors = plans._tensors(arguments)
        before = _C.plan_count()
        written.clear()
        driver.launches.clear()
        results = _C.call_operator(name, *arguments)
        assert not driver.launches, f"{name} went through Triton"
        made += (is_new := _C.plan_count() > before)
        reused += not is_new
        ours = named(written, tensors)
        expected = getattr(fastnorm.triton_kernels, name)(*arguments)
        theirs = named(driver.launches, tensors)
        driver.launches.clear()
        results_by_python = plans.call(name, *arguments)
        by_python = named(driver.launches, tensors)
        assert type(results) is type(results_by_python) is type(expected)
        outputs = [_described(each) for each in (results, results_by_python, expected)]
        if not (ours == by_python == theirs and outputs[0] == outputs[1] == outputs[2]):
            different.append([name, ours, by_python, theirs, outputs])
    return {"made": made, "reused": reused, "different": different[:2]}


def _described(results) -> list:
    return [r if r is None else [list(r.shape), list(r.stride()), str(r.dtype)] for r in results]


def special(target: str) -> dict:
    """Whatever is not a plain repeated launch."""
    driver, written = start(target)
    x, w = torch.zeros(4, 64), torch.ones(64)
    arguments = (x, None, None, None, 1, 1, 1, w, None, 1e-5, False, False, True, True, None, torch.float32, None)
    found = {}

    def launches() -> list[int]:
        written.clear()
        driver.launches.clear()
        _C.call_operator("row_norm_forward", *arguments)
        return [len(written), len(driver.launches)]

    plans.CALLS_BEFORE = 1
    found["plain"] = [launches() for _ in range(3)]
    through: list = []
    run, triton.JITFunction.run = triton.JITFunction.run, lambda *a, warmup, **k: through.append(warmup) or run(
        *a, warmup=warmup, **k
    )
    for _ in range(4):  # by the launcher; by a plan that is made, with Triton's JIT to compile; and by that plan
        driver.launches.clear()
        through.clear()
        plans.call("row_norm_forward", x[:3], *arguments[1:])
        found.setdefault("by Python", []).append([len(driver.launches), list(through)])
    triton.JITFunction.run = run
    plans.CALLS_BEFORE = 0
    hook = lambda described: None  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    found["with a profiler's hook"] = launches()
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    found["stream"] = (launches(), written[0][4])[1]
    torch.use_deterministic_algorithms(True, warn_only=True)
    y = _C.call_operator("row_norm_forward", *arguments)[0]  # which the launcher leaves as it is
    found["memory of deterministic runs"] = bool(y.isnan().all())
    torch.use_deterministic_algorithms(False)

    driver.launches.clear()
    written.clear()
    on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    shapes = [call("row_norm_forward", *on_meta)[0].shape for call in (_C.call_operator, plans.call)]
    found["without memory"] = [len(written), len(driver.launches), [list(shape) for shape in shapes]]

    plans.launcher, launcher = None, plans.launcher
    found["without a launcher"] = launches()
    plans.launcher = launcher

    known = _C.plan_count()
    triton.runtime.driver.set_active(Driver(target))
    _C.call_operator("row_norm_forward", *arguments)
    found["plans of another driver"] = _C.plan_count() - known
    triton.runtime.driver.set_active(driver)

    start.status = 201  # a thread without a context, which Triton's launcher makes
    found["without a context"] = launches()
    start.status = 719
    try:
        launches()
    except RuntimeError as error:
        found["error"] = str(error)
    start.status = 0

    threads = [threading.Thread(target=lambda: _C.call_operator("row_norm_forward", *arguments)) for _ in range(8)]
    written.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["threads"] = len(written)

    if child := os.fork():
        found["fork"] = os.waitpid(child, 0)[1]
    else:
        os._exit(0 if launches() == [1, 0] else 1)

    # what C++ can't repeat: an operation that is no allocation, view or copy
    original = fastnorm.triton_kernels.row_norm_forward
    fastnorm.triton_kernels.row_norm_forward = lambda x, *others: original(x + 1, *others)
    _C.clear_plans()
    found["unusual"] = [launches(), launches()]
    fastnorm.triton_kernels.row_norm_forward = original

    _C.clear_plans()
    found["recorder is idle"] = jit.recorder.note is None
    return found


if __name__ == "__main__":
    target = sys.argv[1]
    found = {"special": special(target)} if target == "sm_90" else {}
    started = start(target)
    found["compared"] = compared(*started, 66, [channel_norm_arguments, row_norm_arguments, row_norm_arguments])
    found["lists"] = compared(*started, 24, [list_arguments])
    print(json.dumps(found))
