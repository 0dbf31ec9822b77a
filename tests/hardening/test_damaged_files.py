"""Files that were cut off or changed on the way: refused in one line, or read as what they are."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import contents
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.fit import checkpoints
from normswap.fit.data import open_data
from normswap.fit.randomness import Randomness
from normswap.source.checkpoint import read_checkpoint
from normswap.source.program import open_program

X = torch.ones(2, 1, 8, 8)
Reader = Callable[[Path], object]
RUN = {"about": {"steps": 3, "lr": 0.1}, "step": 1, "losses": [1.0], "scaler": {}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def saved(path: Path) -> None:
    normswap.save(normswap.convert(net(), "group_norm", groups=2), path.parent)


def program(path: Path) -> None:
    torch.export.save(torch.export.export(net(), (X,)), path)


def images(path: Path) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"{number % 2}/{number}.png", buffer.getvalue())


def data(path: Path) -> object:
    return list(open_data(str(path)))


FILES: dict[str, tuple[Callable[[Path], object], Reader, int]] = {
    "w.pt": (lambda p: torch.save(net().state_dict(), p), read_checkpoint, 100),
    "old.pt": (
        lambda p: torch.save(net().state_dict(), p, _use_new_zipfile_serialization=False),
        read_checkpoint,
        100,
    ),
    "w.safetensors": (lambda p: save_file(net().state_dict(), p), read_checkpoint, 100),
    "model.safetensors": (saved, lambda p: normswap.load(p.parent, source=net), 100),
    "training.safetensors": (
        lambda p: checkpoints.write(p.parent, {"model": net().state_dict()}, RUN),
        lambda p: (checkpoints.facts_in(p.parent), checkpoints.read(p.parent)),
        100,
    ),
    "d.npz": (lambda p: np.savez(p, x=np.zeros((5, 2)), y=np.arange(5)), data, 100),
    "packed.npz": (lambda p: np.savez_compressed(p, x=np.zeros((5, 2))), data, 60),
    "i.zip": (images, data, 100),
    "m.pt2": (program, open_program, 40),
}


def damaged(whole: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return whole[: draw.randrange(len(whole))]
    content = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):  # where the structure is: at the ends
        places = (
            range(len(whole)),
            range(min(3000, len(whole))),
            range(max(0, len(whole) - 800), len(whole)),
        )
        content[draw.choice(draw.choice(places))] = draw.randrange(256)
    return bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_refused_in_one_line_or_read(name: str, tmp_path: Path) -> None:
    make, read, times = FILES[name]
    path = tmp_path / name
    make(path)
    read(path)
    whole, draw = path.read_bytes(), random.Random(0)
    others = contents(tmp_path).keys()
    refusals = 0
    for _ in range(times):
        path.write_bytes(damaged(whole, draw))
        try:
            read(path)
        except NormswapError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 900
    assert refusals > times / 2
    assert contents(tmp_path).keys() == others


@pytest.mark.parametrize(
    "facts",
    [
        "[" * 100_000,
        '{"about": ' * 50_000,
        "9" * 10_000,
        '{"about": {"steps": "many"}, "step": 1, "losses": [], "scaler": {}}',
        '{"about": {}, "step": 1, "losses": [], "scaler": {}}',
        '{"about": {"steps": 3}, "step": null, "losses": [], "scaler": {}}',
        '{"about": {"steps": 3}, "step": 1, "losses": "x", "scaler": {}}',
        '{"about": {"steps": 3}, "step": 1, "losses": [], "scaler": {"scale": "x"}}',
    ],
)
def test_facts_of_another_form_are_refused(facts: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / checkpoints.FILE, {"normswap.training": facts})
    for read in (checkpoints.read, checkpoints.facts_in):
        with pytest.raises(NormswapError, match="is damaged or no checkpoint"):
            read(tmp_path)


def _changed(file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["normswap.training"])
    tensors = load_file(file)
    change(facts, tensors)
    save_file(tensors, file, {"normswap.training": json.dumps(facts)})


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "no model": lambda f, t: [t.pop(name) for name in list(t) if name.startswith("model/")],
    "no random numbers": lambda f, t: [t.pop(n) for n in list(t) if n.startswith("random0/")],
    "no place": lambda f, t: [t.pop(n) for n in list(t) if n.startswith("data0/")],
    "random numbers": lambda f, t: t.update({"random0/torch": torch.ones(3)}),
    "more": lambda f, t: t.update({"random0/numpy": torch.full((626,), 10**15)}),
    "python": lambda f, t: t.update({"random0/python": torch.ones(4, dtype=torch.long)}),
    "place": lambda f, t: t.update({"data0/counts": torch.ones(2)}),
    "far": lambda f, t: t.update({"data0/counts": torch.tensor([1, 10**15, 0])}),
    "optimizer": lambda f, t: t.update({"optimizer/x.momentum_buffer": torch.ones(1)}),
    "another": lambda f, t: t.update({"optimizer/999.momentum_buffer": torch.ones(1)}),
    "shape": lambda f, t: t.update({"optimizer/0.momentum_buffer": torch.ones(7)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_run_does_not_go_on_from_a_checkpoint_that_was_changed(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    batches = [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(3)]

    def run(resume: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*net(), nn.Flatten(), nn.Linear(144, 4))
        normswap.finetune(model, batches, steps=3, checkpoint=tmp_path, resume=resume)

    run(False)
    _changed(tmp_path / checkpoints.FILE, lambda facts, tensors: facts.update(step=1))
    run(True)
    _changed(tmp_path / checkpoints.FILE, change)
    before = Randomness.now()
    with pytest.raises(NormswapError) as error:
        run(True)
    assert "\n" not in str(error.value)
    assert before.python == Randomness.now().python
