"""Memory and time in proportion to what lies on the disk, whatever a file asks for.

Many cases share one child process, whose peak is measured at the end.
"""

import io
import json
import os
import resource
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from children import child, contents
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hostile_data import arrays, packed
from test_hostile_sources import edit, net, recipe_of, replace, rewritten, saved
from torch import nn

import normswap
from normswap.cli import main
from normswap.core.errors import NormswapError
from normswap.core.memory import limited
from normswap.fit.data import open_data
from normswap.fit.images import open_images
from normswap.passes.recipe import set_source
from normswap.source import parse_input
from normswap.source.checkpoint import load_checkpoint, read_checkpoint
from normswap.source.program import open_program
from normswap.store import resolve

MEGABYTES = 500  # beside what the process had; less than the floor of the limit
ASKS = r"asks for [\d.,]+ ([KMGTPEZ]i)?B of memory"
Edit = dict[str, Any]


def refused(act: Callable[[], object], match: str = ASKS) -> str:
    with pytest.raises(NormswapError, match=match) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def within(work: Callable[[], object], *, megabytes: int = MEGABYTES, seconds: int = 60) -> None:
    """Do `work` in a child, which may not take more memory or time than this."""

    def measured() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert more < megabytes * 1024, f"it took {more // 1024} MB"

    assert child(measured, seconds=seconds) == 0


def all_refused(acts: dict[str, Callable[[], object]], match: str = ASKS) -> Callable[[], None]:
    def run() -> None:
        for name, act in acts.items():
            print(name, file=sys.stderr)  # which of them, where the child fails
            refused(act, match)

    return run


def with_edits(folder: Path, edits: list[Edit], model: nn.Module | None = None) -> None:
    """Save a model to `folder` whose recipe says `edits`."""
    normswap.save(model or net(), folder)
    file = folder / "model.safetensors"
    recipe = {**recipe_of(folder), "edits": edits}
    save_file(load_file(file), file, {"normswap.recipe": json.dumps(recipe)})


def lstm() -> nn.Module:
    return nn.Sequential(nn.LSTM(2, 3))


def operator(**options: Any) -> Edit:
    options = {"conv": "operator", **options}
    return edit("parametrize", path="0", tensor="weight", method="spectral_norm", options=options)


def conditional(conditions: int) -> Edit:
    return replace(method="conditional_batch_norm", options={"num_conditions": conditions})


RECIPES: dict[str, list[Edit]] = {
    "conditions": [conditional(10**8)],
    "more conditions": [conditional(2**31 - 1)],
    "input_size": [operator(input_size=60_000)],
    "input_sizes": [operator(input_size=[10**9, 10**9])],
    "bias": [edit("give_bias", path="1", channels=10**12), edit("give_bias", channels=10**12)],
    "merge": [edit("merge_into", path="0", branches=[{"kernel": "0"}], channels=10**12)],
}


def test_no_field_of_a_recipe_sizes_the_memory(tmp_path: Path) -> None:
    def opens(name: str, edits: list[Edit], source: Callable[[], nn.Module]) -> Any:
        folder = tmp_path / name
        with_edits(folder, edits, model=source())
        assert (folder / "model.safetensors").stat().st_size < 5000
        return lambda: normswap.load(folder, source=source)

    def without_bias() -> nn.Module:
        model = net()
        model[0].bias = None
        return model

    acts = {n: opens(n, e, net) for n, e in RECIPES.items() if n != "bias"}
    bias = edit("give_bias", path="0", channels=10**12)
    acts["bias"] = opens("bias", [bias], without_bias)
    steps = edit("replace_recurrent", path="0", aliases=["0"], method="batch_norm_lstm")
    acts["steps"] = opens("steps", [{**steps, "options": {"max_length": 10**9}}], lstm)
    before = contents(tmp_path)
    within(all_refused(acts))
    assert contents(tmp_path) == before


def test_edits_that_are_small_one_by_one_add_up(tmp_path: Path) -> None:
    first, second = conditional(10**6), {**conditional(10**6), "aliases": ["1"]}
    with_edits(tmp_path, [first, {**second, "site": "1", "path": "1"}])
    refused(lambda: normswap.load(tmp_path, source=net, memory_limit="50MB"))
    # 32 MB each: now it is the weights that do not fit.
    refused(lambda: normswap.load(tmp_path, source=net, memory_limit="80MB"), "do not fit")


def test_what_an_edit_has_freed_does_not_count(tmp_path: Path) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(4096))

    edits = 50 * [edit("statistics_into_affine", path="0")]
    with_edits(tmp_path, edits, wide())
    assert 50 * 4 * 4096 * 4 > 1_000_000
    normswap.load(tmp_path, source=wide, memory_limit="1MB")


def test_a_recipe_does_not_choose_a_model_that_is_larger_than_the_limit(tmp_path: Path) -> None:
    normswap.save(digits(), tmp_path)
    assert isinstance(normswap.load(tmp_path), nn.Module)
    text = json.dumps(recipe_of(tmp_path))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"normswap.recipe": text})
    told = refused(lambda: normswap.load(tmp_path, memory_limit="200KB"))
    assert "(the model of its source)" in told

    def large() -> nn.Module:
        return nn.Sequential(nn.Linear(300, 300))

    # The one that the user names may be of any size.
    with_edits(tmp_path, [], large())
    text = json.dumps(recipe_of(tmp_path))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"normswap.recipe": text})
    refused(lambda: normswap.load(tmp_path, source=large, memory_limit="200KB"), "do not fit")


def digits() -> nn.Module:
    model = resolve("demo:digits").model
    set_source(model, "demo:digits")
    return model


MANY: dict[str, list[Edit]] = {
    "fold_into_tensor": [
        edit("freeze"),
        *3000 * [
            edit("fold_into_tensor", path="0", tensor="weight", role="weight", norm="3",
                 slots={"shape": [4, 1, 1, 1]})
        ],
    ],
    "center": 3000 * [edit("center", path="0", tensor="weight", trainable=True)],
    "bypass": 3000 * [edit("bypass", path="", kept={}, removed=[])],
    "domains": [
        replace(
            method="adaptive_batch_norm", options={"domains": [f"d{n}" for n in range(20_000)]}
        )
    ],
    "whitening": [replace(method="decorrelated_batch_norm", options={"group_size": 10**12})],
    "iterations": [
        replace(
            method="decorrelated_batch_norm", options={"solver": "newton", "iterations": 10**12}
        )
    ],
    "window": [replace(method="local_response_norm", options={"size": 10**12})],
}  # fmt: skip


def test_no_recipe_takes_long(tmp_path: Path) -> None:
    def load() -> None:
        for name, edits in MANY.items():
            print(name, file=sys.stderr)
            with_edits(tmp_path / name, edits)
            refused(lambda name=name: normswap.load(tmp_path / name, source=net), "")

    within(load)


def test_a_plan_is_held_to_its_text_and_the_model() -> None:
    def plan(*edits: Edit, **options: Any) -> normswap.Plan:
        return normswap.Plan.from_json(json.dumps({"edits": edits, "exact": False}), **options)

    def work() -> None:
        refused(lambda: plan(conditional(2**31 - 1)).apply(net()))
        refused(lambda: plan(conditional(10**6), memory_limit="10MB").apply(net()))
        assert plan(conditional(10**6)).apply(net())[3].num_conditions == 10**6
        refused(lambda: (plan() + plan(conditional(2**31 - 1))).apply(net()))
        refused(lambda: normswap.Plan.from_json('{"a": [' + 20_000_000 * "[]," + "[]]}"))
        assert len(plan(*20_000 * [edit("center", tensor="weight", fill=1)]).edits) == 20_000
        constants = 100_000 * [("0.weight", "0")]
        freeze = edit("freeze", folded=True, conditions={"constants": constants})
        refused(lambda: plan(freeze).apply(net()), "has changed")

    within(work)


def test_what_a_user_asks_for_is_not_limited() -> None:
    with limited("1KB"):
        new = normswap.convert(net(), "conditional_batch_norm", num_conditions=1000)
    assert new[3].num_conditions == 1000


def huge(*shape: int) -> torch.Tensor:
    return torch.ones(1).expand(shape)


def nested(depth: int, width: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"w": 3}
    for _ in range(depth):
        inner = {str(number): inner for number in range(width)}
    return inner


def test_a_checkpoint_asks_for_no_more_than_its_tensors(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "expanded": {"weight": huge(10**6, 10**6)},
        "overlapping": {"weight": torch.ones(9).as_strided((10**6, 10**6), (0, 0))},
        "many": {str(n): huge(10**4, 10**3) for n in range(100)},
        "entries": {str(n): {"w": huge(10**4, 10**4)} for n in range(3)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 50_000
    lists = b"\x80\x02" + 1_000_000 * b"]" + b"."
    for name, old in (("lists", False), ("old", True)):
        path = tmp_path / name
        path.write_bytes(saved({}, _use_new_zipfile_serialization=not old))
        if old:
            path.write_bytes(lists)
        else:
            rewritten(path, lambda n, c: lists if n.endswith("data.pkl") else c)
    with (tmp_path / "holes").open("wb") as file:
        header = b'{"w":{"dtype":"U8","shape":[9999999999],"data_offsets":[0,9999999999]}}'
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 9999999999)

    def read(name: str) -> None:
        with limited("80MB" if name in ("lists", "old") else None):
            read_checkpoint(tmp_path / name)

    names = [*files, "lists", "old", "holes"]
    acts: dict[str, Any] = {n: lambda n=n: read(n) for n in names}
    lazy = nn.LazyLinear(4)
    acts["lazy"] = lambda: load_checkpoint(lazy, tmp_path / "expanded")
    within(all_refused(acts))


def test_no_checkpoint_takes_long(tmp_path: Path) -> None:
    torch.save(nested(4, 1000), tmp_path / "nested.pt")
    one = torch.ones(1)
    torch.save({str(n): {"w": one} for n in range(5000)}, tmp_path / "entries.pt")
    deep = {f"{'a.' * 200_000}w{n}": one for n in range(2)}
    torch.save(deep, tmp_path / "deep.pt")
    many = {f"{'a.' * 30}w{n}": torch.ones(1) for n in range(10_000)}
    save_file(many, tmp_path / "many.safetensors")

    def load() -> None:
        for path in sorted(tmp_path.iterdir()):
            refused(lambda path=path: load_checkpoint(nn.Linear(1, 1), path), "checkpoint")
        assert len(read_checkpoint(tmp_path / "many.safetensors")) == 10_000

    within(load)


def test_an_old_checkpoint_is_not_measured_by_its_numbers(tmp_path: Path) -> None:
    numbers = torch.full((30_000_000,), ord("R"), dtype=torch.uint8)
    torch.save({"w": numbers}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "w.pt")["w"], numbers)


def test_a_program_asks_for_no_more_than_its_tensors(tmp_path: Path) -> None:
    whole = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(net().eval(), (torch.ones(2, 1, 8, 8),)), whole)

    def expanded(name: str, content: bytes) -> bytes:
        if not name.endswith("model_weights_config.json"):
            return content
        config = json.loads(content)
        for weight in config["config"].values():
            meta = weight["tensor_meta"]
            meta["sizes"] = [{"as_int": 10**6}, {"as_int": 10**6}]
            meta["strides"] = [{"as_int": 0}, {"as_int": 0}]
        return json.dumps(config).encode()

    changes: dict[str, Callable[[str, bytes], bytes]] = {
        "expanded": expanded,
        "example": lambda n, c: saved(((huge(10**6, 10**6),), {})) if n.endswith("model.pt") else c,
        "JSON": lambda n, c: (
            b"[" + 16_000_000 * b"[]," + b"0]" if n.endswith("models/model.json") else c
        ),
    }
    for name, change in changes.items():
        (tmp_path / name).write_bytes(whole.read_bytes())
        rewritten(tmp_path / name, change)
    within(all_refused({n: lambda n=n: open_program(tmp_path / n) for n in changes}))  # type: ignore[misc]


def encoded(width: int, height: int, kind: str, mode: str = "1", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiled(side: int) -> bytes:
    """A TIFF of one pixel, whose only tile is much larger."""
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (
        struct.pack("<2sHIQ", b"II", 42, 16, 0) + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def test_images_are_refused_before_their_pixels_are_decoded(tmp_path: Path) -> None:
    # With a size, as a model takes, or without one, where every pixel becomes float32.
    files = {
        "a.png": encoded(4000, 4000, "PNG"),
        "a.gif": encoded(4000, 4000, "GIF", "L"),
        "a.tif": encoded(4000, 4000, "TIFF", compression="group4"),
        "a.webp": encoded(2000, 2000, "WEBP", "RGB"),
        "scans.jpg": encoded(3000, 3000, "JPEG", "RGB", quality=1, progressive=True),
        "tile.tif": tiled(30_000),
    }
    for name, content in files.items():
        packed(tmp_path / f"{name}.zip", {name: content})
    frames = [Image.new("L", (3000, 3000), n) for n in range(3)]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    packed(tmp_path / "frames.zip", {"0.gif": (tmp_path / "0.gif").read_bytes()})
    paths = sorted(tmp_path.glob("*.zip"))
    acts: dict[str, Any] = {
        f"{path.name} {size}": lambda path=path, size=size: list(
            open_data(str(path), image_size=size, memory_limit="40MB")
        )
        for path in paths
        for size in (None, (3, 8, 8))
    }
    within(all_refused(acts), megabytes=60)


def test_an_image_that_becomes_gigabytes_is_refused(tmp_path: Path) -> None:
    packed(tmp_path / "one.zip", {"a.png": encoded(9400, 9400, "PNG")})
    small = encoded(1600, 1600, "PNG")
    packed(tmp_path / "batch.zip", {f"{n}.png": small for n in range(64)})
    names = ("one.zip", "batch.zip")
    within(all_refused({n: lambda n=n: list(open_data(str(tmp_path / n))) for n in names}))  # type: ignore[misc]


def test_a_jpeg_is_decoded_at_the_size_that_fits(tmp_path: Path) -> None:
    pixels = np.add.outer(np.arange(2000), np.arange(3000)).astype(np.float32)
    picture = Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8)).convert("RGB")
    picture.save(tmp_path / "a.jpg", quality=90)
    (whole,) = open_data(str(tmp_path), image_size=(3, 100, 150))
    (reduced,) = open_data(str(tmp_path), image_size=(3, 100, 150), memory_limit="8MB")
    assert (whole - reduced).abs().max() < 0.02
    large: dict[str, Any] = {"image_size": (3, 1500, 2500), "memory_limit": "8MB"}
    refused(lambda: list(open_data(str(tmp_path), **large)))


def test_the_limit_of_an_image_is_that_of_when_the_data_were_opened(tmp_path: Path) -> None:
    packed(tmp_path / "i.zip", {"a.png": encoded(3000, 3000, "PNG")})
    options: dict[str, Any] = {"image_size": (3, 8, 8)}
    assert list(open_data(str(tmp_path / "i.zip"), **options))
    refused(lambda: list(open_data(str(tmp_path / "i.zip"), memory_limit="9MB", **options)))


def test_images_that_take_long_are_refused(tmp_path: Path) -> None:
    scans = encoded(8, 8, "JPEG", "L") + 200 * b"\xff\xda"
    packed(tmp_path / "i.zip", {"a.jpg": scans})
    refused(lambda: list(open_data(str(tmp_path / "i.zip"))), "more than 100 scans")
    packed(tmp_path / "j.zip", {"a.ppm": b"P6 " + 50_000_000 * b"#" + b"\n1 1 255 123"})
    within(all_refused({"header": lambda: list(open_data(str(tmp_path / "j.zip")))}, "too long"))
    packed(tmp_path / "k.zip", {"a.png": encoded(8, 8, "PNG") + bytes(70_000_000)})
    within(all_refused({"length": lambda: list(open_data(str(tmp_path / "k.zip")))}))


def test_an_image_may_be_larger_than_what_pillow_allows(tmp_path: Path) -> None:
    packed(tmp_path / "i.zip", {"a.png": encoded(14_000, 14_000, "PNG")})
    read, _, _ = open_images(tmp_path / "i.zip", (1, 8, 8))
    assert read(torch.tensor([0])).shape == (1, 1, 8, 8)


def test_an_array_becomes_float32_a_batch_at_a_time(tmp_path: Path) -> None:
    x = np.zeros((3000, 20_000), dtype=np.uint8)
    x[:, 0] = np.arange(3000) % 251
    np.savez_compressed(tmp_path / "d.npz", x=x)
    del x

    def read() -> None:
        total = 0.0
        for batch in open_data(str(tmp_path / "d.npz")):
            assert batch.dtype is torch.float32
            total += float(batch.sum())
        assert total == sum(n % 251 for n in range(3000))

    within(read, megabytes=130)


def test_shapes_and_types_of_arrays_do_not_multiply_the_memory(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, tuple[int, ...]]] = {
        "one sample": ("|u1", (1, 300_000_000)),
        "a batch": ("|u1", (64, 10_000_000)),
        "no numbers": ("|u1", (10**12, 0)),
        "fortran": ("<f8", (10**6, 10**6)),
        "structured": ([("a", "<f8", (10**6,))], (10**4, 10)),
        "text": ("<U100000000", (2, 2)),
        "wide": ("<c32", (10**6, 10**4)),
    }
    acts: dict[str, Any] = {}
    for name, (descr, shape) in cases.items():
        header = {"descr": descr, "fortran_order": name == "fortran", "shape": shape}
        path = arrays(tmp_path / f"{name}.npz", header, b"few")
        acts[name] = lambda path=path: open_data(str(path))
    labels = {"descr": "|u1", "fortran_order": False, "shape": (10**10,)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, labels)
    np.save(small := io.BytesIO(), np.zeros((3, 2)))
    path = packed(tmp_path / "y.npz", {"x.npy": small.getvalue(), "y.npy": buffer.getvalue()})
    acts["labels"] = lambda: open_data(str(path))
    within(all_refused(acts))


def test_a_member_without_a_suffix_is_not_unpacked(tmp_path: Path) -> None:
    path = packed(tmp_path / "d.npz", {"x": bytes(200_000_000)})
    within(all_refused({"x": lambda: open_data(str(path))}, "damaged"), megabytes=100)


def test_a_thousand_entries_more_take_no_longer(tmp_path: Path) -> None:
    np.save(x := io.BytesIO(), np.zeros((3, 2)))
    members = {f"{n}.npy": b"" for n in range(20_000)}
    path = packed(tmp_path / "d.npz", {**members, "x.npy": x.getvalue()}, zipfile.ZIP_STORED)
    deep = tmp_path / "i"
    for _ in range(60):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "back").symlink_to(tmp_path / "i")
    (deep / "a.png").write_bytes(encoded(3, 3, "PNG"))

    def read() -> None:
        assert len(list(open_data(str(path)))) == 1
        assert len(list(open_data(str(tmp_path / "i")))) == 1

    within(read)


def transformers_whose(from_pretrained: Callable[..., Any]) -> SimpleNamespace:
    """A transformers in which this makes models, of configurations that name no architecture."""
    configuration = SimpleNamespace(architectures=None)
    return SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=lambda *_, **__: configuration),
        AutoModel=SimpleNamespace(from_pretrained=from_pretrained),
    )


def test_a_configuration_does_not_size_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AutoModel:
        """As transformers': built on the meta device, and what no file holds is made then."""

        @staticmethod
        def from_pretrained(name: str, **options: Any) -> nn.Module:
            config = json.loads((Path(name) / "config.json").read_text())
            width = config["hidden_size"]
            with torch.device("meta"):
                layers = [nn.Linear(width, width) for _ in range(config["num_hidden_layers"])]
            return nn.Sequential(*layers).to_empty(device="cpu")

    monkeypatch.setitem(sys.modules, "transformers", transformers_whose(AutoModel.from_pretrained))
    acts: dict[str, Any] = {}
    for name, (width, layers) in {"wide": (10**5, 1), "deep": (1, 10**7)}.items():
        (tmp_path / name).mkdir()
        config = {"hidden_size": width, "num_hidden_layers": layers}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        acts[name] = lambda name=name: resolve(f"hf:{tmp_path / name}")
    within(all_refused({"wide": acts["wide"]}))
    with limited("40MB"):
        within(all_refused({"deep": acts["deep"]}, "asks for num_hidden_layers = 10000000"))
    os.mkfifo(tmp_path / "deep" / "model.safetensors")
    refused(acts["deep"], "is no regular file")


CLAIMS: dict[str, Any] = {
    "num_hidden_layers": 100_000,
    "n_layer": 10**9,
    "depths": [2, 2, 10**12, 2],
    "num_labels": 10**9,
    "text_config": {"num_local_experts": 10**6},
    "vision_config": {"depth": int("9" * 400)},
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_configuration_counts_is_refused_before_anything_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def from_pretrained(folder: str, **options: Any) -> Any:
        made.append(folder)
        raise RuntimeError("made")

    monkeypatch.setitem(sys.modules, "transformers", transformers_whose(from_pretrained))
    config = {"vocab_size": 250_000, "label2id": {"n_layers": 21_000}, name: CLAIMS[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: resolve(f"hf:{tmp_path}"), "and the limit is one for each 128.0 KiB of 1.0 GiB")
    assert not made
    (tmp_path / "config.json").write_text(json.dumps({**config, name: 24}))
    refused(lambda: resolve(f"hf:{tmp_path}"), "cannot build .*: made; check the name")
    assert made


def test_tensors_without_numbers_are_counted_as_they_are_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def from_pretrained(folder: str, **options: Any) -> Any:
        with torch.device("meta"):
            while True:
                made.append(torch.empty(1))

    monkeypatch.setitem(sys.modules, "transformers", transformers_whose(from_pretrained))
    refused(lambda: resolve(f"hf:{tmp_path}"), r"8,193 tensors or more .* 128.0 KiB of 1.0 GiB")
    assert len(made) == 8192


def test_an_input_of_any_size_is_not_drawn() -> None:
    within(all_refused({"input": lambda: parse_input("uint8:30000x1x30000")}))


def test_the_limit_is_told_and_raised_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    normswap.save(digits(), tmp_path / "m")
    before = contents(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["normswap", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    folder, out = str(tmp_path / "m"), str(tmp_path / "out")
    status, told = run("fold", folder, "--out", out, "--memory-limit", "100KB")
    assert status == 2 and told.count("\n") == 1
    assert "and the limit is 97.7 KiB: as given" in told and "--memory-limit" in told
    assert contents(tmp_path) == before
    assert run("inspect", folder)[0] == 0  # the limit was that of the command before
    assert run("inspect", folder, "--memory-limit", "1GB")[0] == 0
    status, told = run("inspect", folder, "--memory-limit", "much")
    assert status == 2 and "is no size; write it as 8GiB" in told


def test_every_command_that_opens_files_takes_the_limit() -> None:
    from typer.main import get_command

    from normswap.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    takers = {
        name
        for name, each in commands.items()
        if any(parameter.name == "memory_limit" for parameter in each.params)
    }
    assert takers == commands.keys() - {"methods"}
