"""`python -m bench host` times every way of calling, without a GPU too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pandas")
pytest.importorskip("triton")

from bench import host


def test_the_command_times_every_operation(kernel_cache, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(kernel_cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", "host", "--quick", "--output", str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("host-*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    ours = [r for r in results if r["provider"] == "fastnorm-triton"]
    assert len(ours) == 2 * len(host.NORMS) + len(host.CLIPS) and not any(r["absent"] for r in ours)
    assert all(0 < r["best_us"] <= r["median_us"] for r in ours)
    assert re.search(r"batch_norm_training_add_relu +forward \+ backward", done.stdout)


def test_a_provider_that_breaks_is_named_and_stops_nothing():
    def breaks(operation):
        raise RuntimeError("wants a card")

    providers = host.Provider("torch", lambda operation: len), host.Provider("liger", breaks)
    case = host.Case("rms_norm", "forward", None, providers, lambda function: lambda: function(()))
    found = host.timed([case], host.CpuTimer(), host.Budget(repeats=2, min_time=1e-4, min_sample=1e-5))
    assert [(r["provider"], r["absent"]) for r in found] == [("torch", ""), ("liger", "RuntimeError: wants a card")]
    table = host.table(found)
    assert "liger: RuntimeError: wants a card" in table and "–" in table
