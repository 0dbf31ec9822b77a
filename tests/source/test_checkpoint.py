"""Weights from files: what is read, and that nothing in a file is ever run."""

import os
import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.source.checkpoint import load_checkpoint, read_checkpoint


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
    model(torch.randn(2, 3, 8, 8))
    return model


class _Runs:
    """A pickle of this creates `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_state_dicts_are_read_whatever_they_are_wrapped_in(
    tmp_path: Path, wrap: str | None, prefix: str
) -> None:
    state = _model().state_dict()
    saved: dict[str, Any] = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save({wrap: saved, "epoch": 3} if wrap else saved, tmp_path / "weights.pth")
    assert _equal(read_checkpoint(tmp_path / "weights.pth"), state)


def test_safetensors_is_recognised_by_its_content(tmp_path: Path) -> None:
    state = _model().state_dict()
    save_file(state, tmp_path / "weights.bin")
    assert _equal(read_checkpoint(tmp_path / "weights.bin"), state)


def test_legacy_torch_files_are_read(tmp_path: Path) -> None:
    state = dict(_model().state_dict())
    torch.save(state, tmp_path / "old.th", _use_new_zipfile_serialization=False)
    assert _equal(read_checkpoint(tmp_path / "old.th"), state)


def test_module_prefix_stays_where_not_every_name_has_it(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt").keys() == {"module.a", "b"}


def test_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    saved, other, x = _model().eval(), _model().eval(), torch.randn(2, 3, 8, 8)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    assert not torch.equal(saved(x), other(x))
    load_checkpoint(other, tmp_path / "w.safetensors")
    assert torch.equal(saved(x), other(x))


def test_wrapped_model_takes_the_checkpoint_of_its_inside(tmp_path: Path) -> None:
    saved, wrapped = _model(), nn.DataParallel(_model())
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_checkpoint(wrapped, tmp_path / "w.pt")
    assert _equal(wrapped.module.state_dict(), saved.state_dict())


def test_checkpoint_from_before_num_batches_tracked_is_complete(tmp_path: Path) -> None:
    saved, model = _model(), _model()
    state = {k: v for k, v in saved.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert torch.equal(model[3].weight, saved[3].weight)
    assert model[1].num_batches_tracked == 0


def test_model_that_asks_for_its_layout_version_loads(tmp_path: Path) -> None:
    mnasnet = pytest.importorskip("torchvision").models.mnasnet0_5
    save_file(mnasnet(weights=None).state_dict(), tmp_path / "w.safetensors")
    load_checkpoint(mnasnet(weights=None), tmp_path / "w.safetensors")


def test_nan_weights_are_loaded_as_they_are(tmp_path: Path) -> None:
    model = _model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["0.weight"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    load_checkpoint(model, tmp_path / "w.safetensors")
    assert model[0].weight[0].isnan().all()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("how", ["torch", "pickle", "legacy"])
def test_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, how: str, suffix: str
) -> None:
    path, ran = tmp_path / f"evil{suffix}", tmp_path / "ran"
    state = {"0.weight": torch.ones(1), "x": _Runs(ran)}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"x": _Runs(ran)}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    with warnings.catch_warnings(), pytest.raises(NormswapError) as caught:
        warnings.simplefilter("error")
        read_checkpoint(path)
    assert not ran.exists()
    assert "\n" not in str(caught.value)
    content = path.read_bytes()
    pickle.loads(content) if how == "pickle" else torch.load(BytesIO(content), weights_only=False)
    assert ran.exists()  # the file was dangerous indeed


def test_whole_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(_model(), tmp_path / "model.pt")
    with pytest.raises(NormswapError, match=r"would run torch\.nn\S+.*save model\.state_dict\(\)"):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 20, 700])
def test_truncated_file_is_refused(tmp_path: Path, kind: str, kept: int) -> None:
    path = tmp_path / "w.any"
    if kind == "safetensors":
        save_file(_model().state_dict(), path)
    else:
        torch.save(_model().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(NormswapError, match="damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(NormswapError, match="cannot read checkpoint"):
            read_checkpoint(path)


def test_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("<html>not found</html>")
    with pytest.raises(NormswapError, match="damaged"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [torch.ones(2), [1], {}, {"a": 1}, {1: torch.ones(1)}])
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(NormswapError, match="state dict"):
        read_checkpoint(tmp_path / "w.pt")


def test_other_names_and_shapes_are_told_and_leave_the_model_alone(tmp_path: Path) -> None:
    model = _model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["0.weight"] = torch.zeros(8, 3, 5, 5)
    for n in range(5):
        state[f"head.{n}"] = torch.zeros(1)
    del state["1.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(NormswapError) as caught:
        load_checkpoint(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing: 1.bias;" in message
    assert "5 unexpected: head.0, head.1, head.2, ...;" in message
    assert "1 of another shape: 0.weight (8x3x5x5, the model has 8x3x3x3)" in message
    assert "\n" not in message
    assert _equal(dict(model.state_dict()), before)


def _stored(path: Path, content: Any, model: nn.Module) -> str:
    torch.save(content, path / "w.pt")
    return load_checkpoint(model, path / "w.pt")


WRAPPERS = ["state_dict", "model", "model_state_dict", "params_ema", "generator", "net", "weights"]


@pytest.mark.parametrize("entry", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "_orig_mod.", "a.module.b."])
def test_any_entry_and_any_prefix_is_taken_off_and_said(
    tmp_path: Path, entry: str, prefix: str
) -> None:
    saved, model = _model(), _model()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "optimizer": optimizer, entry: state}
    done = _stored(tmp_path, content, model)
    assert _equal(model.state_dict(), saved.state_dict())
    assert repr(entry) in done
    assert not prefix or repr(prefix) in done
    assert _stored(tmp_path, saved.state_dict(), model) == ""


def test_compiled_modules_inside_lose_their_wrapper(tmp_path: Path) -> None:
    saved, model = _model(), _model()
    compiled = nn.Sequential(*saved)
    compiled[0] = torch.compile(saved[0])
    assert "'_orig_mod.'" in _stored(tmp_path, compiled.state_dict(), model)
    assert _equal(model.state_dict(), saved.state_dict())
    _stored(tmp_path, saved.state_dict(), compiled)  # and the other way round


def test_of_several_entries_that_fit_the_average_is_taken_and_otherwise_the_first(
    tmp_path: Path,
) -> None:
    first, second, model = _model(), _model(), _model()
    content = {"params": first.state_dict(), "params_ema": second.state_dict()}
    done = _stored(tmp_path, content, model)
    assert "'params_ema'" in done
    assert "not 'params'" in done
    assert _equal(model.state_dict(), second.state_dict())
    content = {"teacher": first.state_dict(), "student": second.state_dict()}
    assert "takes 'teacher'" in _stored(tmp_path, content, model)
    assert _equal(model.state_dict(), first.state_dict())


def test_of_a_generator_and_a_discriminator_that_is_taken_which_fits(tmp_path: Path) -> None:
    saved, model, larger = _model(), _model(), nn.Sequential(_model(), nn.Linear(4, 4))
    content = {"discriminator": larger.state_dict(), "generator": saved.state_dict()}
    assert _stored(tmp_path, content, model) == "takes 'generator'"
    assert _equal(model.state_dict(), saved.state_dict())


def test_prefix_that_some_names_lack_is_no_prefix(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in _model().state_dict().items()}
    with pytest.raises(NormswapError, match="does not fit"):
        _stored(tmp_path, {**state, "criterion.weight": torch.ones(2)}, _model())


def test_names_of_an_older_weight_norm_fit_its_parametrization(tmp_path: Path) -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3))

    older, newer = layers(), layers()
    for layer in older:
        torch.nn.utils.weight_norm(layer)
    for layer in newer:
        torch.nn.utils.parametrizations.weight_norm(layer)
    assert "older weight_norm" in _stored(tmp_path, {"generator": older.state_dict()}, newer)
    x = torch.randn(1, 2, 8)
    assert torch.equal(older(x), newer(x))


def test_entry_in_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    with pytest.raises(NormswapError, match="state dict"):
        _stored(tmp_path, content, _model())


def test_the_command_says_what_it_took_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from normswap.cli.steps import open_model
    from normswap.demo.digits import digits

    state = {f"module.{name}": value for name, value in digits().state_dict().items()}
    torch.save({"params_ema": state}, tmp_path / "w.pt")
    open_model("demo:digits", tmp_path / "w.pt", None, None)
    said = capsys.readouterr().err.replace("\n", "")
    assert "takes 'params_ema', leaves out 'module.'" in said
