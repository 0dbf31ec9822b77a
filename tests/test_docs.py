"""What the pages show runs, and what they list is all there is.

Each page has a folder and a namespace of its own. Its ```python blocks run in order, those with a
title= are written to that file, and of its ```sh blocks the `normswap` commands run, of which those
that train take fewer steps than is shown. There are 300 images to learn from. What is not to run
has a line `<!-- not run: why -->` before it.
"""

import ast
import doctest
import inspect
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from torch import Tensor

import normswap
import normswap.nn
from normswap.demo import digits

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", DOCS / "index.md", DOCS / "tutorial.md"]
PAGES += [DOCS / f"{name}.md" for name in ("choose", "coming_from", "rewrites")]
PAGES += sorted(DOCS.glob("how-to/*.md"))
FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w*)(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
ELSEWHERE = ("make ", "pip install ")  # make's targets are run by CI itself
STEPS = ("--recover", "--steps")


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', found[3])
        line = text.count("\n", 0, found.start(4))
        yield Block(found[2], title[1] if title else "", found[4], line, runs=not found[1])


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and not line.startswith(ELSEWHERE):
            assert words[0] == "normswap", f"{line!r} cannot be run: mark it"
            yield words


def some_digits(split: str, whole=digits.digits_data) -> tuple[Tensor, Tensor]:
    x, y = whole(split)
    return (x[:300], y[:300]) if split == "train" else (x, y)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, run, tmp_path, monkeypatch) -> None:
    if page.stem == "privacy":
        pytest.importorskip("opacus")
    if page.stem == "small_batches":
        pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if page.stem != "privacy":  # whose private images are those behind the first 600
        monkeypatch.setattr(digits, "digits_data", some_digits)
    namespace = {"__name__": page.stem}
    ran = 0
    for block in blocks(page):
        if not block.runs:
            continue
        if block.title:
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            # Lines before it are blank, so that a traceback tells the page's own.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
            ran += 1
        elif block.language == "sh" and page.stem != "index":  # whose command is the README's
            for _, *words in commands(block):
                for at, word in enumerate(words[:-1], 1):
                    if word in STEPS:
                        words[at] = "5"
                assert run(*words)[0] == 0, " ".join(words)
                ran += 1
    assert ran


def test_the_first_page_shows_the_command_of_the_readme() -> None:
    (shown,), (whole, *_) = (
        [
            words
            for block in blocks(page)
            if block.runs and block.language == "sh"
            for words in commands(block)
        ]
        for page in (DOCS / "index.md", ROOT / "README.md")
    )
    assert [word for word in whole if word not in ("--recover", "200")] == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page) -> None:
    assert page.read_text().count("```") == 2 * len(list(blocks(page)))
    assert {block.language for block in blocks(page)} <= {"python", "sh", "text"}


def test_every_page_is_in_the_navigation_once() -> None:
    def files(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for each in entry.values() if isinstance(entry, dict) else entry:
                yield from files(each)

    listed = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], ids=lambda page: page.stem
)
def test_links_lead_to_a_file_and_a_heading(page) -> None:
    prose = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
        assert not anchor or anchor in slugs, link


def test_the_reference_has_every_public_name_where_it_is_defined() -> None:
    shown = {
        path
        for page in DOCS.glob("api/*.md")
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    public = [getattr(each, name) for each in (normswap, normswap.nn) for name in each.__all__]
    assert {f"{each.__module__}.{each.__qualname__}" for each in public} <= shown


VERBS = ("inspect", "plan", "convert", "fold", "freeze", "create", "save", "export", "compare")
VERBS += ("calibrate", "recover", "finetune", "reestimate")


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_in_the_reference_runs(verb) -> None:
    shown = doctest.DocTestParser().get_doctest(
        inspect.getdoc(getattr(normswap, verb)) or "", {}, verb, None, 0
    )
    assert shown.examples[0].source.startswith("import ")  # it can be copied as it stands
    failed, attempted = doctest.DocTestRunner().run(shown)
    assert attempted == len(shown.examples) and not failed


def test_the_page_of_commands_is_the_generators() -> None:
    """Otherwise: python tools/commands_page.py"""
    page = runpy.run_path(str(ROOT / "tools" / "commands_page.py"))["page"]()
    assert (DOCS / "cli.md").read_text() == page


def test_what_survives_is_what_the_methods_declare() -> None:
    rows = re.findall(r"^\| \*(\w+)\* \|.*$", (DOCS / "survives.md").read_text(), re.MULTILINE)
    assert rows == ["exact", "near", "calibrated"]
    for line in (DOCS / "survives.md").read_text().splitlines():
        keeps = re.match(r"\| \*(\w+)\* \|", line)
        if keeps:
            named = re.findall(r"`(\w+)`", line)
            assert sorted(named) == sorted(
                name
                for name, method in normswap.methods().items()
                if method.keeps == keeps[1] and method.kind != "input"
            )


def test_every_figure_names_a_tool_that_is_there() -> None:
    text = (DOCS / "figures.md").read_text()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        tools = re.findall(r"python (tools/\w+\.py)", " ".join(section.split()))
        title = section.splitlines()[0]
        assert tools or "`make " in section, f"no command under {title!r}"
        assert all((ROOT / tool).is_file() for tool in tools)


def test_reasons_are_those_of_the_plans() -> None:
    """Each reason that docs/reasons.md explains is written somewhere in the package."""
    said = [
        node.value
        for path in (ROOT / "normswap").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    rows = re.findall(r"^\| (?!reason|---)([^|]+) \|", (DOCS / "reasons.md").read_text(), re.M)
    parts = [each.strip(" ,:") for row in rows for each in re.split(r"\*[^*]+\*|[;()]|\.\.\.", row)]
    assert len(rows) > 20
    assert not [each for each in parts if not any(each in text for text in said)]
