"""What is built is what is in the tree, and it works where the tree is not."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import normswap

pytest.importorskip("build")
pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "normswap"
README = ROOT / "README.md"
# Of a package that is required, and which cannot be without it.
PARTS = {"markupsafe": "jinja2", "pydantic_core": "pydantic"}
INFO = f"normswap-{normswap.__version__}.dist-info"


def _build(source: Path, out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    _build(ROOT, out, "--wheel")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"{INFO}/METADATA").decode())


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_as_it_is_on_disk_and_nothing_else(wheel: Path) -> None:
    on_disk = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    built = _contents(wheel)
    assert {name for name in built if not name.startswith(f"{INFO}/")} == set(on_disk)
    assert all(built[name] == content for name, content in on_disk.items())
    assert "normswap/py.typed" in on_disk and "normswap/demo/digits.safetensors" in on_disk


def test_the_sdist_builds_the_same_wheel_and_holds_what_the_tests_need(
    wheel: Path, tmp_path: Path
) -> None:
    _build(ROOT, tmp_path, "--sdist")
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path)
    source = tmp_path / f"normswap-{normswap.__version__}"
    for name in ("tests", "tools", "examples", "docs", "Makefile", "constraints.txt"):
        assert (source / name).exists(), name
    _build(source, tmp_path, "--wheel")
    assert _contents(next(tmp_path.glob("*.whl"))) == _contents(wheel)


def test_the_metadata_name_the_version_the_license_and_every_python(metadata: Message) -> None:
    assert metadata["Version"] == normswap.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    declared = {c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", [])}
    assert {"3.10", "3.11", "3.12", "3.13"} <= declared


def test_the_oldest_versions_declared_are_those_that_make_test_oldest_installs(
    metadata: Message,
) -> None:
    declared = {}
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if "test" not in str(requirement.marker) and "docs" not in str(requirement.marker):
            (bound,) = requirement.specifier
            assert bound.operator == ">=", text
            declared[canonicalize_name(requirement.name)] = Version(bound.version)
    installed = {}
    for line in (ROOT / "constraints-oldest.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            installed[canonicalize_name(name)] = Version(version)
    assert declared == installed


def test_what_an_index_shows_is_complete(metadata: Message) -> None:
    from trove_classifiers import classifiers

    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert 20 < len(metadata["Summary"]) < 200 and metadata["Keywords"]
    assert set(metadata.get_all("Classifier", [])) <= classifiers


def test_every_package_that_is_imported_is_required(metadata: Message) -> None:
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    names = {canonicalize_name(each.name) for each in required}
    distributions = packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for package in imported(ast.parse(path.read_text(encoding="utf-8"))):
            package = PARTS.get(package, package)
            known = {canonicalize_name(name) for name in distributions.get(package, [package])}
            assert known & names, f"{path} imports {package}"


def imported(tree: ast.AST) -> Iterator[str]:
    """The packages that a file imports and that are neither Python's nor ours."""
    for node in ast.walk(tree):
        paths = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            paths.append(node.module)
        for path in paths:
            package = path.partition(".")[0]
            if package not in (*sys.stdlib_module_names, "normswap"):
                yield package


def test_the_wheel_in_a_fresh_environment_runs_the_readme_and_the_demo(
    wheel: Path, tmp_path: Path
) -> None:
    """What it requires is that of this environment, which is not installed once more."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [python, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    purelib = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (purelib / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    where = run("-c", "import normswap; print(normswap.__file__)")
    assert where.startswith(str(purelib))
    version = run(python.with_name("normswap"), "--version")
    assert version.split()[-1] == normswap.__version__
    shown = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    run("-c", "".join(shown))
    assert (tmp_path / "model.onnx").is_file()
    demo = "convert demo:digits --to group_norm --data demo:digits --samples 64"
    demo += " --recover 2 --onnx --out out"
    assert "accuracy, recovered" in run("-m", "normswap", *demo.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "recipe.json"}
