"""How the numbers of a model are told in a sentence."""

from collections.abc import Sequence

from normswap.report.advice.findings import Findings


def count(number: int, noun: str) -> str:
    """1 BatchNorm, 53 BatchNorms."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def of(part: int, whole: int, noun: str) -> str:
    """all 53 BatchNorms, the one BatchNorm, 44 of 61 BatchNorms."""
    if part == whole:
        return f"the one {noun}" if whole == 1 else f"all {whole} {noun}s"
    return f"{part} of {count(whole, noun)}"


def some(names: Sequence[str], most: int = 3) -> str:
    """a, b, c and 12 more."""
    shown = ", ".join(name or "(the model)" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def time_of(findings: Findings) -> str:
    """A sentence on the time that the normalizations take; empty where it is unknown."""
    cost = findings.cost
    if cost is None or cost.share < 0.005:
        return ""
    where = "on this CPU" if cost.device == "cpu" else f"on this {cost.device} device"
    return f"The normalizations take {cost.share:.0%} of a forward pass {where}, uncompiled."


def sentences(*parts: str) -> str:
    """Those that are not empty, one after the other."""
    return " ".join(filter(None, parts))
