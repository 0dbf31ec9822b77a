"""Under Lightning and transformers: statistics frozen in training, the same model afterwards."""

import copy
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Residual, batch_norms, randomise
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit import callbacks
from normswap.fit.callbacks import FrozenStatistics

Train = Callable[..., None]
EPOCHS, BATCH, STEPS = 2, 4, 3
X = torch.randn(STEPS * BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1
FRAMEWORKS = ["lightning.pytorch", "pytorch_lightning", "transformers"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual())


def loss_of(output: Tensor) -> Tensor:
    return (output - torch.linspace(-1, 2, 6)).square().mean()


def optimizer_of(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9)


def by_hand(model: nn.Module) -> None:
    """The same training as the frameworks', in a loop of torch alone."""
    optimizer = optimizer_of(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    for _ in range(EPOCHS):
        for x in X.split(BATCH):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()


def under_lightning(name: str) -> Train:
    lightning = pytest.importorskip(name)

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return loss_of(self.model(x))

        def validation_step(self, x: Tensor, index: int) -> None:
            assert not self.model.training
            self.model(x)

        def configure_optimizers(self) -> SGD:
            return optimizer_of(self)

    def train(model: nn.Module, *given: Any, directory: Path | None = None) -> None:
        if directory is not None:
            given += (import_module(f"{name}.callbacks").ModelCheckpoint(directory),)
        trainer = lightning.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=list(given),
            logger=False,
            enable_checkpointing=directory is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(X, batch_size=BATCH)
        trainer.fit(Module(model), loader, loader)

    return train


def under_transformers(output: Path) -> Train:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Module(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            output = self.model(x)
            return {"loss": loss_of(output), "logits": output}

    class InOrder(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter({"x": x} for x in X)

    def train(model: nn.Module, *given: Any, directory: Path | None = None) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(directory or output),
            max_steps=EPOCHS * STEPS,
            per_device_train_batch_size=BATCH,
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no" if directory is None else "steps",
            save_steps=STEPS,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        optimizer = optimizer_of(model)
        transformers.Trainer(
            Module(model),
            arguments,
            train_dataset=InOrder(),
            eval_dataset=InOrder(),
            callbacks=list(given),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)),
        ).train()

    return train


@pytest.fixture(params=FRAMEWORKS)
def train(request: pytest.FixtureRequest, tmp_path: Path) -> Train:
    """Train a model on X under a framework, with validation in between."""
    name: str = request.param
    return under_transformers(tmp_path) if name == "transformers" else under_lightning(name)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


def test_it_is_training_with_the_batch_norms_in_eval_mode(train: Train) -> None:
    """Bit for bit what a hand-written loop comes to, and that moves weights, gains and biases."""
    model, expected = network(), network()
    train(model, FrozenStatistics())
    by_hand(expected)
    assert_equal(model.state_dict(), expected.state_dict())
    assert_equal(statistics(model), statistics(network()))
    before = dict(network().named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_without_it_every_statistic_moves(train: Train) -> None:
    model = network()
    train(model)
    after = statistics(model)
    assert not any(torch.equal(after[name], old) for name, old in statistics(network()).items())


def test_afterwards_only_the_weights_are_others(train: Train) -> None:
    model, other = network(), network()
    kept = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    own = [sorted(vars(module)) for module in model.modules()]
    train(model, FrozenStatistics())
    train(other)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == kept
    assert [type(module) for module in model.modules()] == [type(m) for m in other.modules()]
    assert [module.training for module in model.modules()] == [m.training for m in other.modules()]
    assert [sorted(vars(module)) for module in model.modules()] == own
    assert_equal(pickle.loads(pickle.dumps(model)).state_dict(), model.state_dict())
    model.train()(X)
    assert not torch.equal(model.bn.running_mean, network().bn.running_mean)


def test_checkpoints_have_the_keys_of_the_model(train: Train, tmp_path: Path) -> None:
    model = network()
    train(model, FrozenStatistics(), directory=tmp_path / "checkpoints")
    written = sorted(tmp_path.glob("checkpoints/**/*.ckpt")) + sorted(
        tmp_path.glob("checkpoints/**/model.safetensors")
    )
    assert written
    for path in written:
        if path.suffix == ".ckpt":
            state = torch.load(path, weights_only=True)["state_dict"]
        else:
            state = pytest.importorskip("safetensors.torch").load_file(path)
        state = {name.removeprefix("model."): value for name, value in state.items()}
        assert state.keys() == model.state_dict().keys()
        assert_equal({name: state[name] for name in statistics(model)}, statistics(network()))


def test_one_callback_serves_several_trainings(train: Train) -> None:
    callback = FrozenStatistics()
    for _ in range(2):
        model = network()
        train(model, callback)
        assert_equal(statistics(model), statistics(network()))
        assert {type(model.get_submodule(path)) for path in batch_norms(model)} == {
            nn.BatchNorm2d,
            nn.BatchNorm1d,
        }


def test_what_was_frozen_before_stays_frozen(train: Train) -> None:
    model = ns.freeze(network())
    train(model, FrozenStatistics())
    model.train()(X)
    assert_equal(statistics(model), statistics(network()))


class BreaksOff(Residual):
    """Its third forward in training fails."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls == 3:
            raise RuntimeError("broken off")
        return super().forward(x)


@pytest.mark.parametrize("name", FRAMEWORKS[:2])
def test_a_lightning_training_that_breaks_off_thaws(name: str) -> None:
    model = randomise(BreaksOff())
    with pytest.raises(RuntimeError, match="broken off"):
        under_lightning(name)(model, FrozenStatistics())
    before = statistics(model)
    assert_equal(before, statistics(network()))
    model.train()(X)
    assert not torch.equal(model.bn.running_mean, before["bn.running_mean"])


def test_a_transformers_training_that_breaks_off_can_go_on_or_be_thawed(tmp_path: Path) -> None:
    train, model, callback = (
        under_transformers(tmp_path),
        randomise(BreaksOff()),
        FrozenStatistics(),
    )
    with pytest.raises(RuntimeError, match="broken off"):
        train(model, callback)
    thawed = ns.unfreeze(copy.deepcopy(model))
    train(model, callback)
    for each in (thawed, model):
        assert_equal(statistics(each), statistics(network()))
        assert type(each.bn) is nn.BatchNorm2d


def test_one_that_was_thawed_by_hand_does_not_disturb_the_next(tmp_path: Path) -> None:
    train, model, callback = (
        under_transformers(tmp_path),
        randomise(BreaksOff()),
        FrozenStatistics(),
    )
    with pytest.raises(RuntimeError, match="broken off"):
        train(model, callback)
    ns.unfreeze(model, inplace=True)
    other = network()
    train(other, callback)
    assert type(model.bn) is type(other.bn) is nn.BatchNorm2d


def test_a_model_without_running_statistics_is_refused(train: Train) -> None:
    model = ns.convert(network(), "group_norm", inputs=X)
    with pytest.raises(NormswapError, match="leave FrozenStatistics out"):
        train(model, FrozenStatistics())


def test_damaged_statistics_are_refused_and_nothing_is_frozen(train: Train) -> None:
    model = network()
    model.head.running_var.fill_(-1)
    with pytest.raises(NormswapError, match=r"head is negative"):
        train(model, FrozenStatistics())
    assert type(model.bn) is nn.BatchNorm2d


@pytest.mark.parametrize("name", FRAMEWORKS[:2])
def test_weight_averaging_that_resets_statistics_is_refused(name: str) -> None:
    train = under_lightning(name)
    averaging = import_module(f"{name}.callbacks").StochasticWeightAveraging(swa_lrs=1e-2)
    with pytest.raises(NormswapError, match="leave it or FrozenStatistics out"):
        train(network(), averaging, FrozenStatistics())


def test_it_is_a_callback_of_every_framework_that_is_here() -> None:
    """As Lightning asks for with one callback alone, and its command line with any."""
    for name in FRAMEWORKS:
        framework = pytest.importorskip(name)
        callback = getattr(framework, "TrainerCallback", None) or framework.Callback
        assert issubclass(FrozenStatistics, callback)


def test_it_loads_without_any_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FRAMEWORKS:
        monkeypatch.setitem(sys.modules, name, None)
    alone = runpy.run_path(callbacks.__file__)["FrozenStatistics"]
    assert alone.__bases__ == (object,)
    assert alone.__doc__ == FrozenStatistics.__doc__
