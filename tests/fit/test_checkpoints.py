"""A checkpoint is whole or absent, and one that is neither is told of in one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from normswap.core.errors import NormswapError
from normswap.fit import checkpoints

PARTS = {
    "model": {"a.weight": torch.randn(3, 2), "a.count": torch.tensor(3), "b/c": torch.ones(0)},
    "random0": {"torch": torch.arange(9, dtype=torch.uint8)},
}
FACTS = {
    "about": {"steps": 5, "lr": 0.1},
    "step": 3,
    "losses": [1.0, 0.3],
    "scaler": {},
    "curve": [(0, 0.5)],
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "run", PARTS, FACTS)
    parts, facts = checkpoints.read(tmp_path / "run")
    assert facts == FACTS == checkpoints.facts_in(tmp_path / "run")
    assert {part: tensors.keys() for part, tensors in parts.items()} == {
        part: tensors.keys() for part, tensors in PARTS.items()
    }
    for part, tensors in PARTS.items():
        for name, tensor in tensors.items():
            assert (
                torch.equal(parts[part][name], tensor) and parts[part][name].dtype == tensor.dtype
            )
    assert checkpoints.facts_in(tmp_path) is None


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.FILE
    checkpoints.write(tmp_path, PARTS, FACTS)
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        _refused(tmp_path)
    path.write_bytes(b"\xff" * 64)
    _refused(tmp_path)
    path.write_bytes(whole.replace(b'"about', b'"other'))
    _refused(tmp_path)
    save_file({"weight": torch.ones(2)}, path)  # a model's weights
    _refused(tmp_path)
    save_file({"weight": torch.ones(2)}, path, {"normswap.training": "[1]"})
    _refused(tmp_path)


def _refused(folder: Path) -> None:
    for reads in (checkpoints.read, checkpoints.facts_in):
        with pytest.raises(NormswapError, match="is damaged or no checkpoint of normswap"):
            reads(folder)


def test_an_interrupted_write_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(tmp_path, PARTS, FACTS)

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(tmp_path, PARTS, {**FACTS, "step": 4})
    assert checkpoints.read(tmp_path)[1]["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == [checkpoints.FILE]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_as_it_would_have(cls: type[torch.optim.Optimizer]) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        return model, cls(model.parameters(), lr=0.1, **options)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3, 4, 4)).square().sum().backward()
        optimizer.step()

    expected, optimizer = made()
    step(expected, optimizer)
    tensors = checkpoints.whole(checkpoints.optimizer_tensors(optimizer))
    model, other = made()
    step(model, other)
    other.state.clear()
    checkpoints.load_optimizer(other, tensors)
    step(expected, optimizer)
    step(model, other)
    assert torch.equal(model.weight, expected.weight)  # type: ignore[arg-type]
