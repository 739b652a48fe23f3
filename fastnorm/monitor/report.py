"""The monitor's findings in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..clip.health import EXPLODING, NONFINITE, VANISHING, flag_of, judge
from .records import Names, Record

_SHOWN = 5  # how many steps a list names
_ALWAYS = 0.9  # the share of clipped steps above which a threshold is a learning rate
_FEW = 10  # with fewer clips, such as those of a warm-up's start, the share says nothing


def in_words(
    records: Sequence[Record], names: Names, sizes: Sequence[int], bounds: tuple[float, float, float], factor: float
) -> str:
    """One finding in each line."""
    if not records:
        return "nothing was recorded yet"
    lines = [_totals(records), _clips(records), _skips(records), _spikes(records, factor)]
    lines += [_first(records, names, sizes, bounds, flag) for flag in (NONFINITE, EXPLODING, VANISHING)]
    lines += [_lost_weights(records, names), _updates(records, names), _inputs(records, names), _zeros(records, names)]
    norms = _norms(records[-1])
    health = judge(names.groups, sizes, norms, records[-1].total_norm, bounds)
    return "\n".join(line for line in (*lines, f"last step: {health.diagnosis}") if line)


def _norms(record: Record) -> list[float | None]:
    measured = record.measured["gradient_norm"].tolist()
    numbers = record.series["gradient_norm"].tolist()
    return [norm if is_measured else None for norm, is_measured in zip(numbers, measured, strict=True)]


def _totals(records: Sequence[Record]) -> str:
    first, last = records[0].step, records[-1].step
    line = f"{len(records)} steps recorded, {first} to {last}" if len(records) > 1 else f"1 step recorded, step {first}"
    finite = [r for r in records if math.isfinite(r.total_norm)]
    if not finite:
        return f"{line}: no total norm is finite"
    largest = max(finite, key=lambda r: r.total_norm)
    median = statistics.median(r.total_norm for r in finite)
    return f"{line}: total norm {median:.3g} (median), at most {largest.total_norm:.3g} (step {largest.step})"


def _clips(records: Sequence[Record]) -> str:
    with_clip = [r for r in records if r.has_clip]
    if not with_clip:
        return "no clip of fastnorm counted: none ran, or the gradients changed after it"
    clipped = [r for r in with_clip if r.clipped]
    share = len(clipped) / len(with_clip)
    line = f"clipped {len(clipped)} of {len(with_clip)} steps ({share:.0%})"
    if clipped:
        line += f", the smallest coefficient is {min(r.coefficient for r in clipped):.2g}"
    if share > _ALWAYS and len(with_clip) >= _FEW:
        line += "; a threshold that always clips is no safety net: it sets the size of the steps"
    return line


def _skips(records: Sequence[Record]) -> str:
    skipped = [str(r.step) for r in records if r.skipped]
    return f"skipped {len(skipped)} of {len(records)} steps: {_some(skipped)}" if skipped else ""


def _spikes(records: Sequence[Record], factor: float) -> str:
    spikes = [f"{r.step} ({r.spike:.3g}×)" if math.isfinite(r.spike) else f"{r.step} (not finite)"
              for r in records if r.spike is not None]  # fmt: skip
    if len(spikes) == 1:
        return f"1 spike, a total norm above {factor:g} × the median: step {spikes[0]}"
    return f"{len(spikes)} spikes, total norms above {factor:g} × the median: steps {_some(spikes)}" if spikes else ""


def _first(
    records: Sequence[Record], names: Names, sizes: Sequence[int], bounds: tuple[float, float, float], flag: str
) -> str:
    """The first step with a gradient of this flag, and the one of its gradients that is worst."""
    flagged: list[tuple[Record, list[int]]] = []
    for record in records:
        norms = _norms(record)
        found = [i for i, norm in enumerate(norms) if flag_of(norm, sizes[i], *bounds[:2]) == flag]
        if found:
            flagged.append((record, found))
    if not flagged:
        return ""
    record, found = flagged[0]
    numbers: list[float] = record.series["gradient_norm"].tolist()
    ranked = sorted(found, key=lambda i: numbers[i])
    # The backward pass comes from the output: the last layer that is not finite met it first.
    worst = {NONFINITE: found[-1], EXPLODING: ranked[-1], VANISHING: ranked[0]}[flag]
    others = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return (f"{flag} first at step {record.step}: {names.groups[worst]} (norm {numbers[worst]:.3g}){others}; "
            f"in {len(flagged)} of {len(records)} steps")  # fmt: skip


def _lost_weights(records: Sequence[Record], names: Names) -> str:
    """The first step whose weights are NaN or infinite: the gradients may be finite, or not yet tell."""
    for record in records:
        weights = record.series["weight_norm"]
        lost = (record.measured["weight_norm"] & ~weights.isfinite()).nonzero().flatten().tolist()
        if lost:
            others = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            return f"weights not finite first at step {record.step}: {names.groups[lost[0]]}{others}"
    return ""


def _updates(records: Sequence[Record], names: Names) -> str:
    return _extremes(records, names, "update_ratio", "update ratios |Δw|/|w|")


def _inputs(records: Sequence[Record], names: Names) -> str:
    return _extremes(records, names, "input_rms", "RMS of the norms' inputs")


def _zeros(records: Sequence[Record], names: Names) -> str:
    return _extremes(records, names, "zero_share", "shares of zeros")


def _extremes(records: Sequence[Record], names: Names, series: str, title: str) -> str:
    """The range of a series at its last measurement."""
    for record in reversed(records):
        numbers = zip(names.of(series), record.series[series].tolist(), strict=True)
        found = {name: number for name, number in numbers if math.isfinite(number)}
        if found:
            low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            return (f"{title} at step {record.step}: from {found[low]:.2g} ({low}) to {found[high]:.2g} ({high}), "
                    f"median {statistics.median(found.values()):.2g}")  # fmt: skip
    return ""


def _some(steps: Sequence[str]) -> str:
    return ", ".join(steps[:_SHOWN]) + (", …" if len(steps) > _SHOWN else "")
