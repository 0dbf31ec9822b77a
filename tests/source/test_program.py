"""A .pt2 is opened where it holds raw tensors and operators alone, and nothing else in it runs."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export.pt2_archive import constants

from normswap.core.errors import NormswapError
from normswap.source.program import open_program

X = torch.randn(2, 1, 8, 8)
Edit = Callable[[dict[str, Any]], None]


class _Runs:
    """A pickle of this creates `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.constant = torch.randn(4, 1, 1)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> dict[str, Tensor]:
        n, _, height, width = x.shape
        y = self.bn(self.conv(x)).reshape(n, -1, height - 2, width - 2) + self.constant
        with torch.no_grad():
            mean = y.mean() + n % 3
        return {"it's": y if gain is None else y * gain, "mean": mean}


def _export(path: Path, **options: Any) -> nn.Module:
    model = _Net().eval()
    torch.export.save(torch.export.export(model, (X,), **options), path)
    return model


def _tamper(
    path: Path,
    *,
    replace: dict[str, Edit | bytes] | None = None,
    add: dict[str, bytes] | None = None,
) -> None:
    """Write the archive again with members replaced (by suffix: bytes, or an edit of the JSON)."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).partition("/")[0]
    for suffix, change in (replace or {}).items():
        name = next(name for name in members if name.endswith(suffix))
        if isinstance(change, bytes):
            members[name] = change
        else:
            content = json.loads(members[name])
            change(content)
            members[name] = json.dumps(content).encode()
    members |= {f"{root}/{name}": content for name, content in (add or {}).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _saved(thing: Any) -> bytes:
    buffer = BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def _trusting_load_runs_it(path: Path) -> None:
    with suppress(Exception):
        torch.export.load(path).module()(X)


def _refused(path: Path, ran: Path, why: str, *, dangerous: bool = True) -> None:
    with pytest.raises(NormswapError, match=why) as caught:
        open_program(path)
    assert not ran.exists()
    assert "\n" not in str(caught.value)
    if dangerous:
        _trusting_load_runs_it(path)
        assert ran.exists(), "the archive was not dangerous, so refusing it proves nothing"


@pytest.mark.parametrize("dynamic", [False, True])
def test_program_computes_what_the_exported_model_did(tmp_path: Path, dynamic: bool) -> None:
    auto = torch.export.Dim.AUTO
    shapes = {"x": {0: auto, 2: auto, 3: auto}} if dynamic else None
    model = _export(tmp_path / "m.pt2", dynamic_shapes=shapes)
    program, example = open_program(tmp_path / "m.pt2")
    assert example is not None and torch.equal(example[0][0], X)
    x = torch.randn(5, 1, 9, 11) if dynamic else X
    assert torch.equal(program(x)["it's"], model(x)["it's"])


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    torch.export.save(torch.export.export(model, (torch.ones(2, 4),)), tmp_path / "m.pt2")
    program, _ = open_program(tmp_path / "m.pt2")
    storages = {p.untyped_storage().data_ptr() for p in program.parameters() if p.ndim == 2}
    assert len(storages) == 1


def test_environment_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _export(tmp_path / "m.pt2")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    open_program(tmp_path / "m.pt2")
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_pickled_weight_is_refused(tmp_path: Path) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)

    def pickled(config: dict[str, Any]) -> None:
        config["config"]["conv.weight"] |= {"use_pickle": True, "path_name": "weight_0"}

    _tamper(
        path,
        replace={"model_weights_config.json": pickled, "weights/weight_0": _saved(_Runs(ran))},
    )
    _refused(path, ran, "'conv.weight' is pickled")


@pytest.mark.parametrize("claimed", [True, False])
def test_pickled_object_is_refused(tmp_path: Path, claimed: bool) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)

    content = pickle.dumps(_Runs(ran))

    def with_object(config: dict[str, Any]) -> None:
        config["config"]["evil"] = config["config"]["constant"] | {
            "path_name": "opaque_obj_0",
            "use_pickle": claimed,
        }

    _tamper(
        path,
        replace={"model_constants_config.json": with_object},
        add={"data/constants/opaque_obj_0": content + bytes(-len(content) % 4)},  # whole floats
    )
    known = hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX")  # an old torch would not load it
    _refused(path, ran, "opaque_obj_0", dangerous=known)


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_legacy_pickles_are_refused(tmp_path: Path, folder: str) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)
    _tamper(path, add={f"data/{folder}/model.pt": _saved({"a": _Runs(ran)})})
    _refused(path, ran, f"data/{folder}/model.pt")


def test_pickled_example_inputs_do_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)
    _tamper(path, replace={"sample_inputs/model.pt": _saved(((_Runs(ran),), {}))})
    _refused(path, ran, "cannot be loaded")


def test_size_expression_that_is_code_is_refused(tmp_path: Path) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)
    code = f"__import__('os').mkdir({str(ran)!r}) or Integer(2)"

    def evil(model: dict[str, Any]) -> None:
        sizes = model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    _tamper(path, replace={"models/model.json": evil})
    _refused(path, ran, "no expression of sizes")


def test_guards_that_are_code_do_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    model = _export(path)
    code = f"__import__('os').mkdir({str(ran)!r}) is None"
    _tamper(path, replace={"models/model.json": lambda m: m.update(guards_code=[code])})
    program, _ = open_program(path)
    assert torch.equal(program(X)["mean"], model(X)["mean"])
    assert not ran.exists()
    _trusting_load_runs_it(path)
    assert ran.exists()


@pytest.mark.parametrize("target", ["torch.os.mkdir", "torch.serialization.os.mkdir"])
def test_call_of_anything_but_an_operator_is_refused(tmp_path: Path, target: str) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)

    def evil(model: dict[str, Any]) -> None:
        node = model["graph_module"]["graph"]["nodes"][0]
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": str(ran)}, "kind": 1}]

    _tamper(path, replace={"models/model.json": evil})
    _refused(path, ran, f"it calls '{target}'", dangerous=False)


@pytest.mark.parametrize(
    "target",
    [
        "_operator.methodcaller",
        "_operator.attrgetter",
        "torch.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__init__",
        "torch.ops.aten.add.__class__",
        "torch.ops.nosuch.op",
        "#custom:x",
    ],
)
def test_target_outside_the_known_operators_is_refused(tmp_path: Path, target: str) -> None:
    path = tmp_path / "m.pt2"
    _export(path)

    def other(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    _tamper(path, replace={"models/model.json": other})
    with pytest.raises(NormswapError, match="it calls"):
        open_program(path)


def test_name_that_would_be_code_is_refused(tmp_path: Path) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    _export(path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        text = archive.read(name).decode()
    code = f"x=__import__('os').mkdir({str(ran)!r})"
    text = text.replace('"name": "x"', f'"name": "{code}"').replace('"x": {', f'"{code}": {{')
    _tamper(path, replace={"models/model.json": text.encode()})
    _refused(path, ran, "is no name")


def test_class_named_in_the_input_structure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    _export(path)

    def enum(model: dict[str, Any]) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "Y"})
        signature["in_spec"] = json.dumps(
            [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
        )

    _tamper(path, replace={"models/model.json": enum})
    with pytest.raises(NormswapError, match="class to import"):
        open_program(path)


def test_compiled_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    _export(path)
    _tamper(path, add={"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(NormswapError, match=r"model\.so"):
        open_program(path)


def test_old_format_is_refused_without_reading_its_pickles(tmp_path: Path) -> None:
    path, ran = tmp_path / "m.pt2", tmp_path / "ran"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", _saved({"a": _Runs(ran)}))
        archive.writestr("serialized_exported_program.json", "{}")
    _refused(path, ran, "old format", dangerous=False)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(NormswapError, match="damaged"):
        open_program(tmp_path / "m.pt2")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NormswapError, match="there is no file"):
        open_program(tmp_path / "m.pt2")
