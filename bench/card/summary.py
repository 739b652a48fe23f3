"""One page of what the stages wrote: card.json for programs, card.md and the last lines of the output for people."""

import json
from collections import Counter, defaultdict
from pathlib import Path

from ..labels import aligned, github, speedup

MOST_FAILURES = 12
MOST_TIMES = 16
LEGENDS = {
    "Times": "Against the others: their time / fastnorm's; ▼ slower.\n\n",
    "Choices": "Time / the time as it is: above 1, the choice pays.\n\n",
}
Table = tuple[list[tuple[str, ...]], tuple[str, ...]]  # rows and headers


def write(folder: Path, stages: list[dict], rehearsal: bool) -> dict:
    """card.json, which is returned, and card.md, as much as is known."""
    found: defaultdict[str, list[dict]] = defaultdict(list)
    for line in _lines(folder / "card.jsonl"):
        found[line["stage"]].append(line)

    def kinds(stage: str, kind: str) -> list[dict]:
        return [line for line in found[stage] if line.get("kind") == kind]

    document = {
        "rehearsal": rehearsal,
        "machine": next((line["machine"] for line in found["times"] if "machine" in line), {}),
        "stages": stages,
        "results": kinds("times", "norm"),
        "clips": kinds("times", "clip"),
        "questions": kinds("questions", "question"),
        "tests": dict(Counter(line["outcome"] for line in found["tests"])),
        "checks": dict(Counter("passed" if line["ok"] else "failed" for line in found["smoke"] if "ok" in line)),
        "left_out": [f"{stage}: {each['left_out']}" for stage in found for each in found[stage] if "left_out" in each],
        "failures": _failures(found),
        "profile": [line for line in _profile(folder / "card.log") if line.startswith('"')],
    }
    (folder / "card.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(_markdown(document), encoding="utf-8")
    return document


def text(folder: Path) -> str:
    """At most 60 lines."""
    document = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    found = tables(document)
    shown = [(found[name][0][:MOST_TIMES], found[name][1]) for name in ("Times", "Choices") if name in found]
    parts = [_headline(document), *_failure_lines(document["failures"], MOST_FAILURES)]
    lines = "\n".join([*parts, *(aligned([headers, *rows]) for rows, headers in shown)]).splitlines()
    return "\n".join([*lines[:59], f"all of it: {folder / 'card.md'}"])


def tables(document: dict) -> dict[str, Table]:
    """Those that have rows, by their titles."""
    found = {"Times": norm_rows(document["results"]), "Clips": clip_rows(document["clips"]),
             "Choices": question_rows(document["questions"])}  # fmt: skip
    return {title: table for title, table in found.items() if table[0]}


def _lines(path: Path) -> list[dict]:
    """A process that was ended may have left half a line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _profile(log: Path) -> list[str]:
    """What ncu printed."""
    return log.read_text(encoding="utf-8").partition("== profile")[2].splitlines()


def _failures(found: defaultdict[str, list[dict]]) -> list[dict]:
    """Of every stage, what went wrong and why."""
    told = [(stage, line["name"], line["detail"]) for stage in list(found) for line in found[stage]
            if line.get("ok") is False]  # fmt: skip
    told += [("tests", line["test"], " ".join(line["why"])) for line in found["tests"] if line["outcome"] == "failed"]
    for line in found["times"]:
        if line.get("status", "ok") != "ok" and line["provider"].startswith("fastnorm"):
            what = f"{line['operation']} {line.get('shape', line.get('list'))} {line['dtype']} {line['provider']}"
            told.append(("times", what, f"{line['status']}: {line['detail']}"))
    return [{"stage": stage, "what": what, "why": why} for stage, what, why in told]


def _headline(document: dict) -> str:
    kind = "REHEARSAL, no figures of a card" if document["rehearsal"] else document["machine"].get("device", "no times")
    stages = ", ".join(f"{s['stage']} {s['ended']}" + (f" ({s['seconds']} s)" if "seconds" in s else "")
                       for s in document["stages"])  # fmt: skip
    counts = f"checks: {document['checks']}; tests: {document['tests']}"
    ends = f"failures: {len(document['failures'])}; left out: {len(document['left_out'])}"
    return f"{kind}\n{stages}\n{counts}; {ends}"


def _failure_lines(failures: list[dict], most: int) -> list[str]:
    lines = [f"FAILED {f['stage']}: {f['what']}: {f['why']}"[:240] for f in failures[:most]]
    return lines + ([f"and {len(failures) - most} more"] if len(failures) > most else [])


TIMES = ("operation", "shape", "dtype", "mode", "µs", "GB/s", "% of copy", "host µs", "stock", "compile", "liger")
CLIPS = ("operation", "list", "case", "dtype", "provider", "µs", "GB/s", "host µs", "against the baseline")


def norm_rows(results: list[dict]) -> Table:
    """A row for each case of fastnorm's, with the speed-ups against stock torch, torch.compile and Liger-Kernel."""
    cases = _by(results, ("operation", "shape", "layout", "dtype", "mode"), "provider")
    rows = []
    for (operation, shape, layout, dtype, mode), providers in cases.items():
        ours, theirs = (providers.get(name, {}) for name in ("fastnorm", "liger"))
        median = ours.get("median_s")
        if median is not None:
            shape = shape if layout == "contiguous" else f"{shape} {layout}"
            liger = theirs["median_s"] / median if theirs.get("median_s") else None
            ratios = map(speedup, (ours["speedup_vs_torch"], ours["speedup_vs_compile"], liger))
            times = f"{median * 1e6:.1f}", f"{ours['gb_per_s']:.0f}", f"{ours['percent_of_ceiling']:.0f}"
            mode = "both" if mode == "forward_backward" else mode
            rows.append((operation, shape, dtype, mode, *times, _microseconds(ours["host_s"]), *ratios))
    return rows, TIMES


def _by(lines: list[dict], case: tuple[str, ...], across: str) -> dict[tuple, dict[str, dict]]:
    """The lines of each case, by their value of `across`."""
    found: defaultdict[tuple, dict[str, dict]] = defaultdict(dict)
    for line in lines:
        found[tuple(line[name] for name in case)][line[across]] = line
    return found


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f}"


def clip_rows(clips: list[dict]) -> Table:
    """A row for each list, case and provider that has a time."""
    timed = [line for line in clips if line["median_s"] is not None]
    return [
        (*(line[name] for name in CLIPS[:5]), _microseconds(line["median_s"]), f"{line['gb_per_s']:.0f}",
         _microseconds(line["host_s"]), speedup(line["speedup"])) for line in timed
    ], CLIPS  # fmt: skip


def question_rows(questions: list[dict]) -> Table:
    """A row for each operation and width: the time as it is, and of each variant what it takes beside that."""
    names = list(dict.fromkeys(line["variant"] for line in questions if line["variant"] != "as it is"))
    rows = []
    for (operation, cols), variants in _by(questions, ("operation", "cols"), "variant").items():
        if base := variants.get("as it is", {}).get("median_s"):
            cells = [variants.get(name, {}) for name in names]
            taken = [f"{c['median_s'] / base:.2f}" if "median_s" in c else "failed" if c else "" for c in cells]
            rows.append((f"{operation} backward", str(cols), f"{base * 1e6:.1f}", *taken))
    return rows, ("operation", "columns", "µs as it is", *names)


def _markdown(document: dict) -> str:
    parts = [f"```\n{_headline(document)}\n{aligned(document['machine'].items())}\n```"]
    lists = {"Failures": _failure_lines(document["failures"], 100), "Left out, for want of time": document["left_out"]}
    parts += [f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in lists.items() if lines]
    parts += [f"## {title}\n\n{LEGENDS.get(title, '')}{github(*table)}" for title, table in tables(document).items()]
    if document["profile"]:
        parts.append("## ncu\n\n```\n" + "\n".join(document["profile"]) + "\n```")
    return "\n\n".join(parts) + "\n"
