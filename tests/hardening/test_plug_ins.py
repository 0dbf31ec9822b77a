"""Methods of installed packages: one that fails is left out, in one line; the others load."""

import importlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import normswap
from normswap.norms import registry

GOOD = """
import torch
from normswap.norms.registry import Method

class Doubled(torch.nn.Identity):
    norm_kind = "doubled"
    def __init__(self, num_features, *, eps=1e-5, affine=True):
        super().__init__()
        self.weight = self.bias = None

method = Method("{name}", Doubled, summary="of " + "{name}")
"""
RAISES = "class Odd(BaseException): pass\nraise Odd('odd\\x1b[31m')"
# By the name of the distribution: its module, and the line of its entry point.
BROKEN = {
    "imports-nothing": ("import there_is_no_such_module", "m0 = {module}:method"),
    "exits": ("raise SystemExit", "m1 = {module}:method"),
    "exits-by-sys": ("import sys\nsys.exit('\\x1b]0;title\\x07\\n')", "m2 = {module}:method"),
    "raises-its-own": (RAISES, "m3 = {module}:method"),
    "is-no-python": ("def (:", "m4 = {module}:method"),
    "has-no-such-name": ("", "m5 = {module}:method"),
    "is-no-method": ("method = 3", "m6 = {module}:method"),
    "is-another": (GOOD.format(name="other"), "m7 = {module}:method"),
    "is-taken": (GOOD.format(name="group_norm"), "group_norm = {module}:method"),
    "is-there-already": (GOOD.format(name="whole"), "whole = {module}:method"),
    "registers-ours": (
        "import normswap\nnormswap.register('stays', int)\nnormswap.register('layer_norm', int)",
        "m10 = {module}:method",
    ),
    "has-odd-facts": (
        GOOD.format(name="m11") + "\nmethod = Method('m11', Doubled, summary=3)",
        "m11 = {module}:method",
    ),
    "builds-nothing": (
        GOOD.format(name="m12") + "\nmethod = Method('m12', None)",
        "m12 = {module}:method",
    ),
    "has-an-odd-name": (
        GOOD.format(name="\\x1b[31mevil[/bold]"),
        "\x1b[31mevil[/bold] = {module}:method",
    ),
    "has-an-odd-value": (GOOD.format(name="m14"), "m14 = {module}: not a name!"),
    "never-ends": ("def f(): f()\nf()", "m15 = {module}:method"),
    "answers-oddly": (
        "class Odd:\n"
        "    @property\n"
        "    def __class__(self):\n"
        "        raise SystemExit\n"
        "method = Odd()",
        "m16 = {module}:method",
    ),
}
PRINTS = "import sys\nprint('printed')\nsys.stdout.write('written')\n" + GOOD.format(name="prints")
ASKS = "import normswap\nassert 'group_norm' in normswap.methods()\n" + GOOD.format(name="asks")
WHOLE = {
    "a-whole-one": (GOOD.format(name="whole"), "whole = {module}:method"),
    "prints": (PRINTS, "prints = {module}:method"),
    "asks": (ASKS, "asks = {module}:method"),
    "z-last": (GOOD.format(name="last"), "last = {module}:method"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lay packages down as pip does; afterwards nobody knows of them."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before, loaded = dict(registry._METHODS), set(sys.modules)

    def installed(packages: dict[str, tuple[str, str]]) -> None:
        for name, (code, entry) in packages.items():
            module = name.replace("-", "_")
            info = site / f"{module}-1.0.dist-info"
            info.mkdir()
            (site / f"{module}.py").write_text(code)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            lines = f"[normswap.methods]\n{entry.format(module=module)}\n"
            (info / "entry_points.txt").write_text(lines)
        importlib.invalidate_caches()
        registry._third_party.cache_clear()

    yield installed
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._third_party.cache_clear()
    for name in {*sys.modules} - loaded:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(site):
            del sys.modules[name]


@pytest.fixture
def run(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    return run


def test_the_others_load_and_each_broken_one_is_named_in_a_line(install, run) -> None:
    before = normswap.methods()
    install({**WHOLE, **BROKEN})
    status, out, err = run("methods", "--json")
    assert status == 0, err
    known = json.loads(out)
    assert {*known} == {*before, "whole", "prints", "asks", "last"}
    assert "stays" not in known and known["whole"]["summary"] == "of whole"
    said = [line for line in err.splitlines() if "is left out" in line]
    assert len(said) == len(BROKEN)
    for name in BROKEN:
        # Of two packages with one method either may be the first.
        names = (name, "a-whole-one") if name == "is-there-already" else (name,)
        assert any(repr(each) in line for each in names for line in said), (name, err)
    controls = [each for each in err if unicodedata.category(each) == "Cc" and each != "\n"]
    assert not controls
    others = [line for line in err.splitlines() if line not in said]
    assert others == ["printed", "written"] or others == ["printed"], others
    # Those that loaded work; the broken ones are not told of again in this process.
    status, out, err = run("convert", "demo:digits", "--to", "last", "--dry-run")
    assert status == 0 and not err, err
    status, _, err = run("convert", "demo:digits", "--to", "m0")
    assert status == 2 and err.count("\n") == 1 and "unknown method 'm0'" in err


def test_ctrl_c_while_they_load_is_the_users(install, run) -> None:
    code = "import builtins\nif not hasattr(builtins, 'again'):\n    raise KeyboardInterrupt\n"
    install({"slow": (code + GOOD.format(name="slow"), "slow = {module}:method")})
    status, _, err = run("methods")
    assert status == 130 and err.count("\n") == 1
    import builtins

    builtins.again = True  # type: ignore[attr-defined]
    try:
        assert "slow" in normswap.methods()
    finally:
        del builtins.again  # type: ignore[attr-defined]


def test_damaged_metadata_of_any_package_stop_nothing(install, run, tmp_path: Path) -> None:
    install(WHOLE)
    for name, content in (("a", b"\xff\xfe[["), ("b", b"[normswap.methods]\n=\n[[[\nx")):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_bytes(content)
    (tmp_path / "site" / "c-1.0.dist-info").mkdir()
    status, out, err = run("methods", "--json")
    assert status == 0, err
    assert {"whole", "last"} <= {*json.loads(out)}


FAILING = """
import torch
from normswap.norms.registry import Method

class Failing(torch.nn.Module):
    norm_kind = "failing"
    def __init__(self, num_features, *, eps=1e-5, affine=True):
        super().__init__()
        {build}
    def forward(self, x):
        {forward}

method = Method("{name}", Failing)
"""
# By the name of the method: what building it does, what calling it does, and what is said of it.
AT_WORK = {
    "builds_badly": ("raise KeyError('no such\\nthing')", "return x", "cannot be made"),
    "exits_when_built": ("raise SystemExit(0)", "return x", "SystemExit"),
    "raises": ("pass", "raise RuntimeError('wrong\\nof two lines')", "RuntimeError: wrong"),
    "objects": ("pass", "print(1); raise ValueError('odd')", "ValueError: odd"),
    "exits": ("pass", "raise SystemExit", "SystemExit"),
    "returns_none": ("pass", "return None", "its output is NoneType, no tensor"),
    "returns_a_number": ("pass", "return x.mean()", "not finite numbers for each of 48 samples"),
    "returns_nan": ("pass", "return x * float('nan')", "not finite numbers"),
    "returns_integers": ("pass", "return x.shape", "its output is Size, no tensor"),
}
NO_MODULE = "from normswap.norms.registry import Method\nmethod = Method('no_module', lambda n: n)"


@pytest.fixture
def failing(install) -> None:
    packages = {
        name: (
            FAILING.format(name=name, build=build, forward=forward),
            f"{name} = {{module}}:method",
        )
        for name, (build, forward, _) in AT_WORK.items()
    }
    install({**packages, "no_module": (NO_MODULE, "no_module = {module}:method"), **WHOLE})


def test_invariances_are_shown_of_all_but_those_that_fail(failing: None, run) -> None:
    status, out, err = run("methods", "--invariances", "--json")
    assert status == 1  # less was done than was asked for
    assert {*json.loads(out)} == {*normswap.methods()} - {*AT_WORK, "no_module"}
    said = [line for line in err.splitlines() if line.endswith("; it is left out")]
    for name, (_, _, says) in {**AT_WORK, "no_module": ("", "", "it makes int, no mod")}.items():
        (line,) = [each for each in said if f" {name} " in each]
        assert says in line, line
    assert len(said) == len(AT_WORK) + 1


@pytest.mark.parametrize("name", ["builds_badly", "exits_when_built", "exits", "no_module"])
def test_a_conversion_to_one_that_fails_is_refused_in_one_line(
    name: str, failing: None, run, tmp_path: Path
) -> None:
    status, out, err = run("convert", "demo:digits", "--to", name, "--out", "out")
    assert (status, out) == (2, ""), err  # and not 0, as a SystemExit would have it
    last = err.splitlines()[-1]  # before it, what other packages print when they are loaded
    assert "normswap: " in last and "unexpected error" not in last and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()
