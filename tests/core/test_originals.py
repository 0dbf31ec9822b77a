"""What is overwritten in place comes back where the rewrite fails, from memory or from disk."""

import copy
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.core import originals
from normswap.core.originals import Originals, kept_on_disk, overwriting

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (700, 700), (2, 3, 5)])
def test_every_tensor_holds_again_what_it_held(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "_SMALL", 64)
    monkeypatch.setattr(originals, "_PIECE", 1000)
    plain = torch.randn(shape).mul(9).to(dtype)
    for tensor in [plain, plain.clone().mT] if plain.dim() > 1 else [plain]:
        before, kept = tensor.clone(), Originals()
        kept.keep(tensor)
        tensor.fill_(1)
        kept.keep(tensor)  # a second time counts for nothing
        kept.restore()
        assert torch.equal(tensor, before)
        kept.close()


def test_where_the_disk_is_full_a_copy_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(originals, "TemporaryFile", full)
    tensor, kept = torch.randn(1000, 1000), Originals()
    before = tensor.clone()
    kept.keep(tensor)
    tensor.zero_()
    kept.restore()
    assert torch.equal(tensor, before)


def test_nothing_is_overwritten_outside_or_kept_after_it() -> None:
    tensor = torch.randn(3)
    assert not kept_on_disk(tensor)
    with overwriting():
        assert kept_on_disk(tensor)
        tensor.zero_()
    assert not kept_on_disk(tensor) and not tensor.any()


class Deep(nn.Module):
    """A stream of RMSNorms and Linears, large enough for the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3000, 128)
        self.norms = nn.ModuleList(nn.RMSNorm(128) for _ in range(2))
        self.up, self.down, self.head = (
            nn.Linear(128, 4096),
            nn.Linear(4096, 128),
            nn.Linear(128, 5),
        )
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(self.up(self.norms[0](x)).relu())
        return self.head(self.norms[1](x))


@pytest.mark.parametrize("verb", ["fold_gains", "rotate", "rescale"])
def test_in_place_the_parameters_stay_the_same_objects_and_memory(verb: str) -> None:
    model, tokens = Deep().eval(), torch.randint(0, 3000, (2, 7))
    with torch.no_grad():
        model.up.weight.mul_(1e6 if verb == "rescale" else 1)
    expected, before = model(tokens), dict(model.named_parameters())
    memory = {name: each.data_ptr() for name, each in before.items()}
    data = {"data": [tokens]} if verb == "rescale" else {}
    result = getattr(ns, verb)(model, tokens, inplace=True, **data)
    assert result is model
    after = dict(model.named_parameters())
    large = [name for name, each in after.items() if each.dim() > 1]
    assert all(after[name] is before[name] for name in large)
    assert all(after[name].data_ptr() == memory[name] for name in large)
    deviation = (model(tokens) - expected).abs().max() / expected.abs().max()
    assert deviation.detach() <= 1e-4


@pytest.mark.parametrize("verb", ["fold_gains", "rotate"])
def test_a_rewrite_in_place_that_fails_leaves_every_number(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = Deep().eval(), torch.randint(0, 3000, (2, 7))
    before = copy.deepcopy(model.state_dict())
    objects = dict(model.named_parameters())
    plan = ns.plan(model, {"fold_gains": ns.FoldAffine, "rotate": ns.Rotate}[verb](), inputs=tokens)
    last = type(plan.edits[-1])
    applied = last.apply

    def fails(self: Any, model: nn.Module) -> None:
        applied(self, model)
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "apply", fails)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model, inplace=True)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each is objects[name] for name, each in model.named_parameters())


def test_nothing_stays_in_the_temporary_folder(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokens = Deep().eval(), torch.randint(0, 3000, (2, 7))
    ns.rotate(model, tokens, inplace=True)
    assert not list(tmp_path.iterdir())
