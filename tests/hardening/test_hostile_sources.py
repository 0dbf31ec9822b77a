"""Models and weights from elsewhere: nothing in them runs, and none asks for all of the memory."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import REFUSED, child, contents, short_of_memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.passes.edits.traced_forward import set_forward
from normswap.passes.recipe import structure_of
from normswap.source.checkpoint import load_checkpoint, read_checkpoint
from normswap.source.program import open_program
from normswap.store import resolve

Edit = dict[str, Any]
X = torch.randn(2, 1, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
    return nn.Sequential(*layers)


class Runs:
    """A pickle of this creates `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Asks:
    """A pickle of this takes so many bytes when it is loaded."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (self.size,)


def recipe_of(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["normswap.recipe"])


def with_edits(folder: Path, edits: list[Edit], **tensors: torch.Tensor) -> None:
    """Save a model to `folder` whose recipe says `edits`."""
    normswap.save(net(), folder)
    file = folder / "model.safetensors"
    recipe = {**recipe_of(folder), "edits": edits}
    save_file({**load_file(file), **tensors}, file, {"normswap.recipe": json.dumps(recipe)})


def replace(**changes: Any) -> Edit:
    edit = {"edit": "replace", "site": "3", "path": "3", "reason": "", "aliases": ["3"]}
    method = {
        "method": "group_norm",
        "num_features": 4,
        "channel_axis": 1,
        "options": {"groups": 2},
    }
    return {**edit, **method, "tail": [], **changes}


def edit(kind: str, **changes: Any) -> Edit:
    return {"edit": kind, "site": "3", "path": "3", "reason": "", **changes}


def refused(act: Callable[[], object], match: str | None = None) -> str:
    with pytest.raises(NormswapError, match=match) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_recipe_that_the_others_change_is_a_good_one(tmp_path: Path) -> None:
    with_edits(tmp_path, [replace(path="3")])
    file = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith(("3.run", "3.num"))}
    save_file(kept, file, {"normswap.recipe": json.dumps(recipe_of(tmp_path))})
    assert isinstance(normswap.load(tmp_path, source=net)[3], nn.GroupNorm)


def test_a_name_that_is_code_does_not_run(tmp_path: Path) -> None:
    # torch.fx writes a module's name into its code between quotes, and the name ends them.
    ran = tmp_path / "ran"
    evil = f'x", getattr(__import__("os"), "mkdir")("{ran!s}"), "'
    bypass = edit("bypass", path="", kept={"_2": 0}, removed=[])
    tensors = {f"{evil}.weight": torch.ones(4), f"{evil}.bias": torch.zeros(4)}
    with_edits(tmp_path / "saved", [replace(aliases=[evil]), bypass], **tensors)
    refused(lambda: normswap.load(tmp_path / "saved", source=net), "not what it expects there")
    own = edit("modularize_norm", node="x", sizes=[4], rank=4, eps=1e-5, frozen=True)
    with_edits(tmp_path / "saved", [own | {"kind": "batch", "child": evil}])
    refused(lambda: normswap.load(tmp_path / "saved", source=net), "cannot be read")
    assert not ran.exists()


def test_no_code_is_generated_for_such_a_name(tmp_path: Path) -> None:
    evil = 'x", print(1), "'
    model = net()
    model.add_module(evil, nn.ReLU())
    graph = torch.fx.Graph()
    graph.output(graph.call_module(evil, (graph.placeholder("input"),)))
    refused(lambda: set_forward(model, graph), "no code can be generated")


@pytest.mark.parametrize(
    "bad",
    [
        edit("freeze", tail=["compile"]),
        edit("freeze", tail=["__class__"]),
        replace(path="__class__"),
        replace(path="forward.__globals__"),
        replace(aliases=["3", "forward"]),
        replace(aliases=["3", "0.weight"]),
        replace(aliases=[]),
        replace(method="os:system"),
        replace(method="weight_norm"),
        replace(options={"num_features": 9}),
        replace(options={"module": "os"}),
        replace(tail=["__init__"]),
        replace(num_features=10**12),
        replace(num_features=-1),
        replace(shift_folded=True),
        edit("reduce", to="identity", aliases=["3"]),
        edit("reduce", to="shift", aliases=["3"], num_features=4),
        edit("reduce", to="affine", aliases=["3"]),
        edit("thaw", carriers=[["0", "weight"]]),
        edit("thaw", carriers=[["9", "weight"]]),
        edit("replace_recurrent", aliases=["3"], method="group_norm", options={}),
        edit("parametrize", tensor="weight", method="os.system", options={}),
        edit("parametrize", tensor="weight", method="group_norm", options={}),
        edit("parametrize", tensor="__class__", method="weight_norm", options={}),
        edit("parametrize", path="0", tensor="weight", method="weight_norm", options={"name": "x"}),
        edit("parametrize", path="0", tensor="weight", method="weight_norm", options={"no": 1}),
        edit("give_bias", channels=10**12),
        edit("take_raw_input", path="0", offset=[0.0], spatial=10**9),
        edit("merge_into", path="0", branches=[{"kernel": "0"}], channels=10**12),
        edit("bypass", path="", kept={"_2": 7}, removed=[]),
        edit("bypass", path="", kept={}, removed=["forward"]),
        edit("bypass", path="", kept={}, removed=["__class__"]),
        edit("bake", tensor="__dict__"),
        edit("center", tensor="__class__"),
        edit("exec", code="1"),
        {"edit": "replace"},
        {},
    ],
)
def test_an_edit_that_names_something_else_is_refused(bad: Edit, tmp_path: Path) -> None:
    with_edits(tmp_path / "saved", [bad])
    model = net()
    before, state = structure_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    refused(lambda: normswap.load(tmp_path / "saved", source=lambda: model))
    assert structure_of(model) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["", "timm:", "torchvision:", "demo:"])
def test_a_source_that_is_a_file_of_code_does_not_run(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import os\nos.mkdir('ran')\ndef evil(): os.mkdir('ran')"
    for file in (Path("evil.py"), Path(f"{scheme}evil.py")):
        file.write_text(code)
    with_edits(tmp_path / "saved", [])
    file = tmp_path / "saved/model.safetensors"
    recipe = {**recipe_of(tmp_path / "saved"), "source": f"{scheme}evil.py:evil"}
    save_file(load_file(file), file, {"normswap.recipe": json.dumps(recipe)})
    refused(lambda: normswap.load(tmp_path / "saved"))
    assert not Path("ran").exists()


def test_a_folder_does_not_take_the_place_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "demo:digits"
    with_edits(folder, [])
    file = folder / "model.safetensors"
    recipe = {**recipe_of(folder), "source": "demo:digits"}
    save_file(load_file(file), file, {"normswap.recipe": json.dumps(recipe)})
    assert type(resolve("demo:digits").model).__name__ == "DigitsNet"
    refused(lambda: normswap.load(folder), "builds another model")


def saved(thing: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


def squeezed(content: bytes) -> bytes:
    """The same archive, its members compressed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    return buffer.getvalue()


def bombs() -> dict[str, bytes]:
    zeros = {"w": torch.zeros(100_000_000, dtype=torch.uint8)}
    return {
        "compressed": squeezed(saved(zeros)),
        "bytearray": saved({"w": Asks(10**12)}),
        "bytearray, legacy": saved({"w": Asks(10**12)}, _use_new_zipfile_serialization=False),
        "storage, legacy": saved(
            {"w": torch.ones(3)}, _use_new_zipfile_serialization=False
        ).replace(b"K\x03N", b"J\xff\xff\xff\x7fN"),
        "header": (2**60).to_bytes(8, "little") + b"{}",
    }


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_does_not_fill_the_memory(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    for name, content in bombs().items():
        assert len(content) < 200_000, name
        path.write_bytes(content)

        def read() -> None:
            short_of_memory(64)
            read_checkpoint(path)

        assert child(read) == REFUSED, name


def test_the_limit_of_memory_is_one() -> None:
    def take() -> None:
        short_of_memory(64)
        try:
            torch.ones(4_000_000_000, dtype=torch.uint8)
        except RuntimeError as error:
            raise NormswapError("no memory") from error

    assert child(take) == REFUSED


def test_a_tar_of_old_is_refused_and_nothing_is_extracted(tmp_path: Path) -> None:
    path, ran = tmp_path / "w.tar", tmp_path / "ran"
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors", "../out", "/tmp/normswap-never"):
            member = tarfile.TarInfo(name)
            member.size = len(content := saved(Runs(ran), _use_new_zipfile_serialization=False))
            archive.addfile(member, io.BytesIO(content))
    before = contents(tmp_path)
    refused(lambda: read_checkpoint(path), "neither safetensors nor a state dict")
    assert contents(tmp_path) == before
    assert not Path("/tmp/normswap-never").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, device="meta"),
        torch.eye(4).to_sparse(),
        torch.ones(4, dtype=torch.complex64),
        torch.nested.nested_tensor([torch.ones(4)], layout=torch.jagged),
    ],
    ids=["meta", "sparse", "complex", "nested"],
)
def test_tensors_that_no_layer_takes_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight = nn.Parameter(torch.zeros(tensor.shape if tensor.layout != torch.jagged else 4))
    torch.save({"weight": tensor}, tmp_path / "w.pt")
    refused(lambda: load_checkpoint(model, tmp_path / "w.pt"))
    assert not model.weight.any()


@pytest.mark.parametrize(
    "name", ["w.pt", "w.safetensors", "w.pt2", "w.py:f", "w.zip", "w.npz", "w"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing", "empty", "text"])
def test_what_is_no_such_file_is_told_at_once(name: str, kind: str, tmp_path: Path) -> None:
    from normswap.fit.data import open_data

    path = tmp_path / name.partition(":")[0]
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.write_text("" if kind == "empty" else "neither code nor data")

    def read() -> None:
        refused(lambda: read_checkpoint(path))
        refused(lambda: resolve(str(tmp_path / name)))
        refused(lambda: list(open_data(str(tmp_path / name))))
        refused(lambda: normswap.load(path))

    assert child(read, seconds=20) == 0


def rewritten(path: Path, change: Callable[[str, bytes], bytes], packing: int = 0) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "m.pt2"
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(net().eval(), (X,), dynamic_shapes=shapes), path)
    return path


def test_a_program_does_not_fill_the_memory(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    inputs = {
        "compressed": squeezed(saved(((torch.zeros(25_000_000),), {}))),
        "bytearray": saved(((Asks(10**12),), {})),
    }
    for content in inputs.values():
        path.write_bytes(program.read_bytes())
        rewritten(path, lambda name, old: content if name.endswith("/model.pt") else old)  # noqa: B023
        refused(lambda: open_program(path), "sample_inputs")
    path.write_bytes(program.read_bytes())
    zeros = bytes(100_000_000)
    rewritten(path, lambda name, old: zeros if name.endswith("weight_0") else old, 8)
    assert path.stat().st_size < 200_000
    refused(lambda: open_program(path), "is compressed")


@pytest.mark.parametrize(
    "size",
    [
        "Pow(Integer(10), Integer(10000000000))",
        "Pow(Integer(10), Mul(Integer(64), Integer(64), Integer(64)))",
        "Pow(Pow(Pow(Integer(10), Integer(64)), Integer(64)), Integer(64))",
        "PowByNatural(Integer(2), Symbol('s0'))",
        "LShift(Integer(1), Integer(100000000000))",
        "Float('1e9999999999')",
        "Float('1.0', precision=10000000000)",
        "Rational('1e9999999999')",
    ],
)
def test_a_size_of_astronomical_length_is_refused(size: str, program: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(program.read_bytes())

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        model = json.loads(content)
        sizes = model["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": size, "hint": {"as_int": 2}}}
        return json.dumps(model).encode()

    rewritten(path, change)
    refused(lambda: open_program(path), "no expression of sizes")


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"3", b"null", b'{"config": 3}', b'{"config": {"a": 1}}', b"[" * 10**5, b"\xff"],
)
@pytest.mark.parametrize(
    "member", ["model_weights_config.json", "models/model.json", "model_constants_config.json"]
)
def test_a_program_that_is_json_of_something_else_is_refused(
    content: bytes, member: str, program: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(program.read_bytes())
    rewritten(path, lambda name, old: content if name.endswith(member) else old)
    refused(lambda: open_program(path))
