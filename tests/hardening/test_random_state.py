"""No verb moves a random number generator, imports included: what runs first is no other run.

All is tried in one new process, since what is imported for the first time there is part of it.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

HERE = Path(__file__)
STEPS, STOPPED_AT = 9, 6
LEARN = ("calibrate", "reestimate", "recover", "finetune", "convert")


class Net(nn.Module):
    """A convolutional network that draws from three generators as it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.ln = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.mid, self.head, self.drop = nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        if self.training and random.random() + float(np.random.rand()) < 1:
            x = x * 1.1
        return self.head(self.drop(self.ln(x)))


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(3, 6, 6) + random.random() + float(np.random.rand())
        return noise + index % 4, index % 4


def net() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        made = Net().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made


def loader() -> DataLoader[Any]:
    """With a generator of its own, which is kept as the others are."""
    return DataLoader(
        Augmented(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)
    )


class Stops:
    """The batches of `data`, the last of them followed by an end that no verb expects."""

    class Here(BaseException):
        pass

    def __init__(self, data: Any, batches: int) -> None:
        self.data, self.batches = data, batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.batches -= 1
            if self.batches < 0:
                raise Stops.Here
            yield batch


def verbs(folder: Path) -> dict[str, Callable[[Any], Any]]:
    """The public verbs, on data of the caller's."""
    import normswap as ns

    x = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)
    swapped = {"groups": 2}

    def recovered(data: Any, **options: Any) -> nn.Module:
        teacher = net()
        student = ns.convert(teacher, "group_norm", inputs=x, **swapped)
        return ns.recover(student, teacher, data, steps=STEPS, **options)

    def stopped(data: Any, kind: str) -> None:
        into = {"checkpoint": folder / kind, "save_every": 2}
        try:
            if kind == "recover":
                recovered(Stops(data, 5 + STOPPED_AT), **into)
            else:
                ns.finetune(net(), Stops(data, 1 + STOPPED_AT), steps=STEPS, **into)
        except Stops.Here:
            pass

    def saved(data: Any) -> nn.Module:
        ns.save(ns.fold(net(), x), folder / "saved")
        return ns.load(folder / "saved", source=net)

    def exported(data: Any) -> str:
        ns.export(net(), x, folder / "net.onnx", validate=False)
        return str(ns.validate(folder / "net.onnx", net(), x))

    def measured(data: Any) -> float:
        from normswap.fit.evaluate import accuracy

        return accuracy(net(), data)

    return {
        # First of all, as it is the first to import most.
        "calibrate": lambda data: ns.calibrate(
            ns.convert(net(), "group_norm", inputs=x, **swapped), net(), data
        ),
        "reestimate": lambda data: ns.reestimate(net(), data),
        "recover": recovered,
        "stopped recover": lambda data: stopped(data, "recover"),
        "finetune": lambda data: ns.finetune(net(), data, steps=STEPS),
        "stopped finetune": lambda data: stopped(data, "finetune"),
        "finetune in tune mode": lambda data: ns.finetune(
            net(), data, steps=2, statistics="tune", precision="bfloat16"
        ),
        "convert": lambda data: ns.convert(net(), "group_norm", data=data),
        "accuracy": measured,
        "compare": lambda data: ns.compare(net(), net(), data=data).agreement,
        "advise": lambda data: bool(ns.advise(net(), x, data=data, batch_size=2)),
        "inspect": lambda data: str(ns.inspect(net(), x)),
        "plan and apply": lambda data: ns.plan(net(), ns.Fold(), inputs=x).apply(net()),
        "plan_of": lambda data: str(ns.plan_of(ns.fold(net(), x))),
        "freeze": lambda data: ns.unfreeze(ns.freeze(net(), x, mode="tune")),
        "parametrize": lambda data: ns.bake(ns.parametrize(net(), "spectral_norm")),
        "center": lambda data: ns.center(net(), x),
        "fold_gains": lambda data: ns.fold_gains(net(), x),
        "rescale": lambda data: ns.rescale(net(), x, data, limit=0.5),
        "rotate": lambda data: ns.rotate(net(), x, with_="random"),
        "absorb_input": lambda data: ns.absorb_input(net(), x, [0.5] * 3, [0.2] * 3),
        "save and load": saved,
        "export and validate": exported,
        "methods and create": lambda data: [
            ns.create(name, 8) and None for name in ("group_norm", "batch_norm", "switchable_norm")
        ],
        "param_groups": lambda data: len(ns.param_groups(net(), weight_decay=0.1)),
        "exponential_lr": lambda data: str(ns.exponential_lr(0.1, 1e-4, 0.9)),
    }


def generators(*others: torch.Generator) -> dict[str, str]:
    """The state of each, in a few letters."""
    states = {
        "python": random.getstate(),
        "numpy": [
            part if isinstance(part, (str, int, float)) else part.tolist()
            for part in np.random.get_state()
        ],
        "torch": torch.get_rng_state().tolist(),
        "loader": [each.get_state().tolist() for each in others],
    }
    return {name: sha256(repr(state).encode()).hexdigest()[:8] for name, state in states.items()}


def told(result: Any) -> str:
    """What a verb gave; of a model its weights, bit by bit."""
    if not isinstance(result, nn.Module):
        return str(result)
    hashed = sha256()
    for name, tensor in result.state_dict().items():
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def seeded() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def every_verb(folder: Path) -> dict[str, Any]:
    """For each verb: which generators it moved, and what it gave; of those that learn, twice."""
    seeded()
    before = generators()
    found = {}
    known = verbs(folder)  # this imports the package
    assert generators() == before, "the import moved a generator"
    for name, verb in known.items():
        results, moved = [], set()
        for _ in range(2 if name in LEARN else 1):
            seeded()
            data = loader()
            before = generators(data.generator)
            results.append(told(verb(data)))
            after = generators(data.generator)
            moved |= {each for each in before if before[each] != after[each]}
        found[name] = {"moved": sorted(moved), "results": results}
    return found


def test_no_verb_moves_a_generator_and_equal_runs_are_equal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: each["moved"] for name, each in found.items() if each["moved"]} == {}
    unequal = [name for name, each in found.items() if len(set(each["results"])) > 1]
    assert unequal == []
    # A run that was stopped in that process goes on in this one to the bits of the first whole run.
    for kind in ("recover", "finetune"):
        torch.manual_seed(99)
        random.seed(99)
        options = {"checkpoint": tmp_path / kind, "save_every": 2, "resume": True}
        assert told(_resumed(kind, options)) == found[kind]["results"][0], kind


def _resumed(kind: str, options: dict[str, Any]) -> nn.Module:
    import normswap as ns

    if kind == "finetune":
        return ns.finetune(net(), loader(), steps=STEPS, **options)
    x, teacher = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6), net()
    student = ns.convert(teacher, "group_norm", inputs=x, groups=2)
    return ns.recover(student, teacher, loader(), steps=STEPS, **options)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    print(json.dumps(every_verb(Path(sys.argv[1]))))
