"""The work of every verb grows with the number of sites and no faster, counted and not timed."""

import importlib
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

import normswap as ns
from normswap.passes import Fold

TOOLS = Path(__file__).parents[2] / "tools"
PACKAGE = str(Path(ns.__file__).parent)
SITES = (3, 6, 12)
VERBS = ("convert", "fold", "freeze, tune", "bake", "unfreeze", "fold without inputs", "plan")
IN_TUNE_MODE = ("bake", "unfreeze")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("bench_sites")


def carry_out(bench: ModuleType, name: str, model: Any) -> None:
    if name in IN_TUNE_MODE:
        getattr(ns, name)(model, inplace=True)
    elif name == "fold without inputs":
        ns.fold(model, None, inplace=True)
    elif name == "plan":
        ns.plan(model, Fold(), inputs=bench.X).to_json()
    else:
        bench.VERBS[name](model)


def lines_run(bench: ModuleType, name: str, model: Any) -> Counter[str]:
    """How many lines of the package ran, by function; a line that loops counts every time."""
    counted: Counter[str] = Counter()

    def in_a_function(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            code = frame.f_code
            counted[f"{code.co_filename[len(PACKAGE) :]}:{code.co_firstlineno}"] += 1
        return in_a_function

    def anywhere(frame: FrameType, event: str, _: Any) -> Any:
        # Watch looks at each operator that runs; how many run is the model's, and calibration's.
        watches = frame.f_code.co_name in (
            "__torch_dispatch__",
            "_keep",
            "address_of",
            "has_memory",
        )
        ours = frame.f_code.co_filename.startswith(PACKAGE) and not watches
        return in_a_function if ours else None

    before = sys.gettrace()
    sys.settrace(anywhere)
    try:
        carry_out(bench, name, model)
    finally:
        sys.settrace(before)
    return counted


# Of a network whose BatchNorms do not fold, tune mode and baking have nothing more to do.
CASES = [
    *(("residual", name) for name in VERBS),
    *(("pre-activation", name) for name in ("convert", "fold", "plan")),
]


@pytest.mark.parametrize(("network", "name"), CASES)
def test_the_work_grows_linearly_with_the_number_of_sites(
    bench: ModuleType, network: str, name: str
) -> None:
    models = [bench.chain(network, sites) for sites in SITES]
    if name in IN_TUNE_MODE:
        models = [bench.VERBS["freeze, tune"](model) for model in models]
    counts = [lines_run(bench, name, model) for model in models]
    less, more = (b.total() - a.total() for a, b in pairwise(counts))
    fastest = {at: n for at, n in counts[2].items() if n > 2.5 * counts[1][at] and n > 1000}
    # From 6 to 12 sites as much is added for a site as from 3 to 6.
    assert more <= 2.05 * less, fastest
