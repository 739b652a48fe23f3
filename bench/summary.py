"""The tables of docs/ from the files in bench/results: `python -m bench summary` fills them in.

A document says between which lines a table stands, and of which files in bench/results it is made:

    <!-- cells NAME.json -->
    <!-- end -->

cells: every case, with its time; operations: the speed-ups of every operation and shape, side by side; spread: the
least, median and largest speed-up of every operation, with the cases that lose; clip: every list of gradients; host:
the host's µs a call, best / median; models: whole models, original and converted; predictions: of `python -m bench
predict`, a row for each call and GPU; card, headline: what `make card` found on cards, all of it or rows of 4096
columns alone, or a sentence as long as there is no card's file; kernels: registers of `python -m bench codegen`'s file,
Liger-Kernel's behind ours, of the row norms, dtypes and widths that the line goes on to name:

    <!-- kernels NAME.json rms_norm,layer_norm bf16 4096 -->
"""

import json
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .card.summary import tables
from .labels import LOSS, github, mode_label, speedup
from .models import model_cells
from .predict import TARGETS
from .report import frame_of, host_cells, markdown, memory, prediction_tables, shapes, shown, states_of, wide

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (ROOT / "docs" / "results.md", ROOT / "docs" / "machine_code.md", ROOT / "README.md")
# fastnorm-native is what fastnorm takes on a CPU
CLIPS = ("fastnorm", "fastnorm-deferred", "fastnorm-autoclip", "fastnorm-adagc", "fastnorm-reference")
KINDS = "cells|operations|spread|clip|kernels|card|headline|host|models|predictions"
BLOCK = re.compile(rf"(<!-- ({KINDS}) ([^>]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

NO_CARD = "GPU times have not been measured yet: `make card` does it on a card."


def main(options: Namespace) -> tuple[int, None]:
    """Fill in the tables of all the documents that were named."""
    for document in options.documents:
        if not document.is_file():
            options.parser.error(f"no such document: {document}")
        print(document, "changed" if fill(document) else "is up to date", sep=": ")
    return 0, None


def fill(document: Path) -> bool:
    """Make the document's tables anew; whether that changed anything."""
    before = document.read_text(encoding="utf-8")
    after = BLOCK.sub(lambda match: f"{match[1]}{_table(match[2], match[3].split())}\n{match[5]}", before)
    document.write_text(after, encoding="utf-8")
    return after != before


def _table(kind: str, names: Sequence[str]) -> str:
    if kind in ("card", "headline"):
        cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(names[0]))]
        cards = [card for card in cards if card["results"] and not card["rehearsal"]]
        return "\n\n".join(_card(document, kind == "headline") for document in cards) or NO_CARD
    if kind == "kernels":
        name, *chosen = names
        return _kernels(kernels_of(RESULTS / name), *(part.split(",") for part in chosen))
    documents = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names]
    results = [result for document in documents for result in document["results"]]
    if kind == "host":
        return markdown(host_cells(results))
    if kind == "models":
        return markdown(model_cells(results))
    if kind == "predictions":
        return "\n\n".join(map(markdown, prediction_tables(results, TARGETS)))
    frame = frame_of(results)
    if kind == "clip":
        return _clip(frame[frame["provider"].isin(CLIPS)])
    ours = frame[frame["provider"] == "fastnorm"].reset_index(drop=True)
    return {"cells": _cells, "operations": _operations, "spread": _spread}[kind](ours)


def _card(document: dict, is_headline: bool) -> str:
    machine = document["machine"]
    if is_headline:
        results = [result for result in document["results"] if result["shape"].endswith("x4096")]
        document = {"results": results, "clips": [], "questions": []}
    title = f"{machine['device']}, torch {machine.get('torch')}, {machine.get('date')}:"
    return "\n\n".join([title, *(github(*table) for table in tables(document).values())])


def _case(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Operation and mode, and the memory where it was not always in use."""
    mode, state = frame["mode"].map(mode_label), memory(frame)
    if states_of(state):
        mode += ", memory " + state
    return {"operation": "`" + frame["operation"] + "`", "mode": mode}


def _cells(frame: pd.DataFrame) -> str:
    return markdown(pd.DataFrame({
        **_case(frame), "shape": _shapes(frame), "dtype": frame["dtype"],
        "ms": shown(frame["median_s"] * 1e3, "{:.3g}".format),
        "against stock": shown(frame["speedup_vs_torch"], speedup),
        "against torch.compile": shown(frame["speedup_vs_compile"], speedup),
    }))  # fmt: skip


def _operations(frame: pd.DataFrame) -> str:
    case = _case(frame)
    columns = case["mode"] + " " + frame["dtype"]
    cells = frame.assign(**case, shape=_shapes(frame), column=columns, cell=shown(frame["speedup_vs_torch"], speedup))
    return markdown(wide(cells, ["operation", "shape"], "column", columns.unique()))


def _spread(frame: pd.DataFrame) -> str:
    frame = frame.assign(**_case(frame), shape=_shapes(frame))
    groups = frame.groupby(["operation", "mode", "dtype"], sort=False)
    three = groups["speedup_vs_torch"].agg(["min", "median", "max"]).map("{:.2f}×".format)
    three[f"below {LOSS}×"] = [_losses(group) for _, group in groups]
    return markdown(three.reset_index().rename(columns={"min": "least", "max": "most"}))


def _losses(group: pd.DataFrame) -> str:
    losing = group[group["speedup_vs_torch"] < LOSS]
    cases = [f"{each.shape}: {each.speedup_vs_torch:.3f}" for each in losing.itertuples()]
    return f"{len(losing)} of {len(group)}" + (f" ▼ ({', '.join(cases)})" if cases else "")


def kernels_of(path: Path) -> list[dict]:
    """The kernels of a JSON file of `python -m bench codegen`."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(document["fields"], kernel, strict=True)) for kernel in document["kernels"]]


def _kernels(kernels: list[dict], operations: list[str], dtypes: list[str], widths: list[str]) -> str:
    """A row for each kernel, dtype and width: registers of ours / Liger-Kernel's, with what it spills, in bytes of a
    thread, and accesses that are narrower than 16 bytes."""
    frame = pd.DataFrame(kernels)
    frame["width"] = shown(frame["cols"].fillna(0), lambda cols: str(int(cols) or "any"))
    chosen = frame["operation"].isin(operations) & frame["dtype"].isin(dtypes) & frame["width"].isin(widths)
    frame = frame[chosen & frame["kernel"].str.contains("forward|backward")]
    spilled = frame["spilled"].map(lambda bytes: f" (spills {bytes})" if bytes else "")
    access = frame["access"].map(lambda bytes: f", {bytes} B" if bytes < 16 else "")
    kernel = frame["kernel"].str.extract("(forward|backward)", expand=False)
    frame = frame.assign(operation="`" + frame["operation"] + "`", kernel=kernel,
                         cell=frame["registers"].map(str) + access + spilled)  # fmt: skip
    rows = ["operation", "kernel", "dtype", "width"]
    both = wide(frame, [*rows, "target"], "provider", ["fastnorm", "liger"], "–")
    both["cell"] = both["fastnorm"] + " / " + both["liger"]
    return markdown(wide(both, rows, "target", frame["target"].unique(), "– / –"))


def _clip(frame: pd.DataFrame) -> str:
    gradients = [f"{r.list}: {r.tensors:,} tensors, {r.elements / 1e6:.3g} M" for r in frame.itertuples()]
    return markdown(pd.DataFrame({
        "operation": "`" + frame["operation"] + "`", "gradients": gradients,
        "case": frame["case"] + ", " + frame["dtype"], "provider": frame["provider"],
        "ms": shown(frame["median_s"] * 1e3, "{:.3g}".format), "against": frame["baseline"],
        "speed-up": shown(frame["speedup"], speedup),
    }))  # fmt: skip


def _shapes(frame: pd.DataFrame) -> list[str]:
    """With the layout of images, whichever it is."""
    return shapes(frame, "×", lambda shape, _: shape.count("×") != 3)
