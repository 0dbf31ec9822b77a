"""Random networks with shared, read and chosen modules: no verb is wrong in silence.

`python tools/fuzz_networks.py --count 2000` is the same at large, and shrinks what it finds.
"""

import pytest
import torch
from checked_verbs import SAME, VERBS, deviation, drawn_verbs, faults, run, shrunk, trained
from networks_as_source import KINDS, Line, Network, network
from torch import nn

import normswap as ns

SEEDS = (*range(39), 59)  # the last is the first that draws a transformer


FOUND = {  # faults that tools/fuzz_networks.py has found
    "a copy where no graph shows the calls": (489, "fold, duplicate"),
    "a slice of a Sequential on one path": (669, "tune"),
    "a slice of a value on one path": (790, "tune"),
    "an attribute decides in a forward that becomes a graph": (1342, "fold"),
    "an attribute decides where a layer is copied": (457, "fold, duplicate"),
    "a dictionary of layers and an argument": (543, "fold, duplicate"),
    "a part of a value is written": (1914, "fold"),
    "an Identity between a value and who takes it on one path": (764, "fold"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_is_mended(what: str) -> None:
    seed, verb = FOUND[what]
    assert list(faults(network(seed), [verb])) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_verb_keeps_what_it_promises_or_refuses(seed: int) -> None:
    drawn = network(seed)
    found = list(faults(drawn, drawn_verbs(seed)))
    assert not found, f"{found}\n{drawn.source()}"


def test_the_seeds_draw_every_kind_of_instruction_and_most_verbs() -> None:
    drawn = [network(seed) for seed in SEEDS]
    assert set[str]().union(*(each.kinds for each in drawn)) == set(KINDS)
    assert {each.form for each in drawn} == {"tensor", "tuple", "dict", "dataclass", "features"}
    assert len({verb for seed in SEEDS for verb in drawn_verbs(seed)}) > len(VERBS) / 2


def test_a_seed_always_draws_the_same_network() -> None:
    for seed in (0, 7):
        drawn = network(seed)
        assert drawn == network(seed)
        first, again = (run(drawn.build(), next(drawn.calls()), grad=False) for _ in range(2))
        assert deviation(first, again) == 0


def test_a_fault_is_noticed_and_shrunk_to_the_lines_that_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: nn.Module, inputs: object) -> nn.Module:
        """A fold that forgets to look whether anything else calls the BatchNorm."""
        return trained(ns.fold(model, None)) if "BatchNorm" in str(model) else model

    monkeypatch.setitem(SAME, "fold", wrong)
    drawn = next(each for each in map(network, SEEDS) if list(faults(each, ["fold"])))
    (fault,) = faults(drawn, ["fold"])
    smallest, same = shrunk(drawn, fault)
    assert (same.verb, same.kind) == (fault.verb, fault.kind)
    assert len(smallest.lines) <= 2 < len(drawn.lines)


def test_the_source_of_a_network_runs_by_itself() -> None:
    lines = (Line("conv", "v1", "v1 = self.m0(v0)"), Line("relu", "v2", "v2 = v1.relu()"))
    made = {"m0": "self.m0 = nn.Linear(4, 3)", "m1": "self.m1 = nn.Linear(1, 1)"}
    source = Network({"v0": (2, 4)}, made, lines, ("v2", "v1"), form="dataclass").source()
    namespace: dict[str, object] = {"__name__": "alone"}
    exec(source, namespace)
    output = namespace["Net"]()(torch.ones(2, 4))  # type: ignore[operator]
    assert torch.equal(output.first, output.rest[0].relu())
    assert "self.m1" not in source
