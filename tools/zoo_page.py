"""The page that sums up a sweep: docs/zoo.md."""

from collections import Counter
from collections.abc import Sequence

import zoo_models
from zoo_measure import Row

REASONS = 25  # how many are listed

HEADER = (
    "family",
    "pass",
    "batch norms",
    "left by fold",
    "left by fuse",
    "fuse fails",
    "fuse wrong",
    "float64 error",
    "float32 error",
    "of limit",
)
PAGE = """\
# The model zoo

Every torchvision model with a BatchNorm and every timm architecture with one below 150 million
parameters, with random affine and statistics, folded and compared with the original:

    python tools/zoo_sweep.py --jobs 2

"""
NOTE = """\
*pass*: error at most 1e-10 in float64, and in float32 at most 1e-5 or 3 times that of the original;
not more left than by fuse; a reason for each that is left. Of detectors the backbone's outputs are
compared. *batch norms*: those that a forward in eval mode executes. *left by fold*: as one scale
and shift per channel, or as they were. *left by fuse* (`torch.fx.experimental.optimization.fuse`):
counts every BatchNorm of a model on which it fails; *fuse wrong*: its result is another function.
*error*: the largest, against the original's output in float64 and relative to its largest value;
*of limit*: the largest share of what is allowed in float32. Each model is a row of `zoo.csv`, whose
columns `tools/zoo_measure.py` explains."""


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each family, as in HEADER."""
    groups = {f: [r for r in rows if r.family == f] for f in zoo_models.FAMILIES}
    lines = [_line(family, group) for family, group in groups.items() if group]
    return [*lines, _line("all", rows)]


def _line(family: str, rows: Sequence[Row]) -> list[str]:
    folded = [row for row in rows if row.error is not None]
    fuse_left = (r.fuse_left if r.fuse_left is not None else r.batch_norms for r in folded)
    return [
        family,
        f"{sum(row.status == 'ok' for row in rows)}/{len(rows)}",
        str(sum(row.batch_norms or 0 for row in folded)),
        str(sum(row.left or 0 for row in folded)),
        str(sum(left or 0 for left in fuse_left)),
        str(sum(bool(row.fuse_failed) for row in folded)),
        str(sum(row.fuse_error is not None and not row.fuse_is_right for row in folded)),
        f"{max((row.error64 or 0.0 for row in folded), default=0.0):.1e}",
        f"{max((row.error or 0.0 for row in folded), default=0.0):.1e}",
        f"{max(((row.error or 0.0) / row.allowed for row in folded), default=0.0):.0%}",
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The page: the summary, why BatchNorms are left, and what did not pass."""
    counts: Counter[str] = Counter()
    for row in rows:
        for item in filter(None, row.left_because.split(" | ")):
            number, _, reason = item.partition(" x ")
            counts[reason] += int(number)
    parts = [_table(HEADER, summary(rows)), NOTE]
    if counts:
        reasons = [(reason, str(n)) for reason, n in counts.most_common(REASONS)]
        others = counts.total() - sum(n for _, n in counts.most_common(REASONS))
        reasons += [("others", str(others))] if others else []
        parts += ["Why they are left:", _table(("reason", "batch norms"), reasons)]
    failed = [f"- {row.family}/{row.name}: {row.why}" for row in rows if row.status != "ok"]
    if failed:
        parts += ["Not passed:", "\n".join(failed)]
    return PAGE + "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
