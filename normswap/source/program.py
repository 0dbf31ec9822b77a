"""Open a `.pt2` that `torch.export.save` wrote, without running anything that it hides.

`torch.export.load` trusts its file: weights, constants and example inputs may be pickles, compiled
libraries are opened, shape expressions and guards are run as Python, names go into generated code,
and an operator's name is looked up below `torch`, where `torch.os.system` is found too. So the
archive is read first, with torch's own reader (two readers can be made to see two different
archives), and refused unless it is made of raw tensors and known operators alone.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from normswap.core.ambient import alone
from normswap.core.calls import check_module
from normswap.core.compat import HigherOrderOperator, OpOverload, OpOverloadPacket, load_pt2, pytree
from normswap.core.errors import NormswapError
from normswap.core.interrupts import at_last
from normswap.core.memory import Allowance
from normswap.core.modes import set_modes
from normswap.core.paths import check_reachable
from normswap.source.archive import check_archive, check_saved

_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/.*"
)
_CONFIGS = (
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_GRAPH, _EXAMPLES = "models/model.json", "data/sample_inputs/model.pt"

# Operators on symbolic sizes. Not the whole of `operator` and `torch`: they hold `methodcaller`
# and every module that torch imports.
_SIZE_OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|mod|floordiv|truediv|pow|neg|pos|abs|and_|or_|not_|xor"
    r"|eq|ne|lt|le|gt|ge|getitem)|math\.[a-z]\w*|torch\.sym_\w+"
)
_NAMESPACES = frozenset({"aten", "prims", "higher_order", "torchvision", "quantized_decomposed"})
_TOUCH_FILES = frozenset({"from_file", "save"})
_EXPRESSIONS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv"
    r"|ModularIndexing|Where|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv"
    r"|CeilToInt|FloorToInt|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity"
    r"|Equality|Unequality|GreaterThan|StrictGreaterThan|LessThan|StrictLessThan"
    r"|And|Or|Not|floor|ceiling|true|false"
)
_SYMBOL_OR_NUMBER = re.compile(r"[A-Za-z_]\w*|-?[\d.]{1,40}(e[+-]?\d{1,3})?")
_LONGEST_EXPRESSION = 10_000
_POWERS = re.compile(r"Pow|Shift")
_EXPONENT = re.compile(
    r"(Integer|Rational)\(-?([1-5]?\d|6[0-4])(, \d{1,2})?\)"
    r"|Float\('-?\d(\.\d{1,20})?', precision=53\)"
)
_SMALL = re.compile(r"True|False|None|\d{1,3}")  # a keyword: positive=True, precision=53
# Text for a person, or written out with repr: any character may be in it.
_FREE_TEXT = frozenset({"metadata", "as_string", "as_strings"})


def open_program(path: Path) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """The program's module and its example inputs (args, kwargs), or None where it has none.

    Its guards on input sizes, which are Python source, are left out: a size that does not fit is
    noticed by the operators. As torch gives it, the module refuses `train()` and `eval()`.

    Raises:
        NormswapError: the file is missing, damaged, of an old format, or asks for more trust.
    """
    check_reachable(path)
    if not path.is_file():
        raise NormswapError(f"there is no file {str(path)!r}; check the path")
    allowance = Allowance.of_file(path)
    try:
        reader = PT2ArchiveReader(str(path))
        with path.open("rb") as file:
            check_archive(reader.archive_file, file, repr(str(path)))
        members = reader.get_file_names()
        if _EXAMPLES in members:
            examples, called = (
                BytesIO(reader.read_bytes(_EXAMPLES)),
                f"{_EXAMPLES} in {str(path)!r}",
            )
            check_saved(examples, called, allowance)
        texts = {name: reader.read_bytes(name) for name in (*_CONFIGS, _GRAPH)}
        for name, text in texts.items():
            allowance.check_json(len(text), name)
        configs = {name: json.loads(text) for name, text in texts.items()}
        problem = next(_problems(members, configs), None)
    except NormswapError:
        raise
    except Exception as error:  # of the reader, or where the JSON is not what it should be
        raise NormswapError(
            f"{str(path)!r} is not a program of torch.export, is damaged, or is of an old format; "
            "write it again with torch.export.save"
        ) from error
    if problem:
        raise NormswapError(
            f"{str(path)!r} is refused, nothing in it was run: {problem}; "
            "export again from the model's source"
        )
    try:
        with _weights_only():
            # Not torch.export.load, which falls back to the old format and its pickles.
            program = load_pt2(str(path)).exported_programs["model"]
            examples = program.example_inputs
        # A tensor may claim any size, all of its elements lying in one place.
        held = {**program.state_dict, **program.constants}
        tensors = [
            each for each in pytree.tree_leaves((held, examples)) if isinstance(each, Tensor)
        ]
        size = sum(each.numel() * each.element_size() for each in tensors)
        allowance.check(size, "its tensors")
        return module_of(program), examples
    except NormswapError:
        raise
    except Exception as error:
        raise NormswapError(
            f"{str(path)!r} cannot be loaded by torch {torch.__version__} "
            f"({type(error).__name__}); export it with this version"
        ) from error


def module_of(program: ExportedProgram) -> nn.Module:
    """The module that computes `program`, with the flags of the mode in which it was exported.

    Its guards on input sizes are left out, as in `open_program`.
    """
    module = program.module(check_guards=False)
    set_modes((each, False) for each in module.modules())
    return module


def opened(model: nn.Module | ExportedProgram, inputs: Any = None) -> tuple[nn.Module, Any]:
    """A program's module and, unless `inputs` are given, its example inputs; a module as it is.

    Raises:
        NormswapError: `model` is neither.
    """
    if not isinstance(model, ExportedProgram):
        check_module(model)
        return model, inputs
    args, kwargs = model.example_inputs or ((), {})
    if inputs is None and bool(args) != bool(kwargs):  # positional or keywords, never both
        inputs = args or kwargs
    return module_of(model), inputs


def _problems(members: list[str], configs: dict[str, Any]) -> Iterator[str]:
    for member in members:
        if not _MEMBERS.fullmatch(member):
            yield f"it has a member {member!r}, which is no raw tensor"
    for name in _CONFIGS:
        for tensor, payload in configs[name]["config"].items():
            if payload["use_pickle"] is not False:
                yield f"{tensor!r} is pickled"
            if not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                yield f"{tensor!r} is no raw tensor"
        yield from _unsafe(configs[name])
    yield from _unsafe({**configs[_GRAPH], "guards_code": []})


def _unsafe(value: Any, key: str = "") -> Iterator[str]:
    """Walk the JSON; tell each string that torch would evaluate, call or write into code."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _is_plain(name):
                yield f"the name {name!r} is no name"
            if name not in _FREE_TEXT:
                yield from _unsafe(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _unsafe(item, key)
    elif isinstance(value, str):
        if key in ("target", "as_operator"):
            if not _is_operator(value):
                yield f"it calls {value!r}"
        elif key == "expr_str":
            if not _is_expression(value):
                yield f"the size {value!r} is no expression of sizes"
        elif key in ("in_spec", "out_spec"):
            if "__enum__" in value:
                yield "its inputs or outputs name a class to import"
        elif not _is_plain(value):
            yield f"the name {value!r} is no name"


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"[\w.:/@+ -]*", text) is not None


def _is_operator(target: str) -> bool:
    if _SIZE_OPERATORS.fullmatch(target):
        return True
    root, _, rest = target.partition("torch.ops.")
    namespace, *names = rest.split(".")
    if root or namespace not in _NAMESPACES or not names or names[0] in _TOUCH_FILES:
        return False
    found: Any = getattr(torch.ops, namespace)
    for name in names:
        found = getattr(found, name, None)
    return isinstance(found, (OpOverload, OpOverloadPacket, HigherOrderOperator))


def _is_expression(text: str) -> bool:
    """Whether `text` only builds sympy expressions: calls of known names on numbers and symbols.

    sympy computes numbers as it builds, so they may not be of astronomical size either.
    """
    if len(text) > _LONGEST_EXPRESSION:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    plain = (ast.Expression, ast.keyword, ast.UnaryOp, ast.USub, ast.Load)
    return all(
        (isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        or (isinstance(node, ast.Name) and _EXPRESSIONS.fullmatch(node.id))
        or (isinstance(node, ast.Constant) and _SYMBOL_OR_NUMBER.fullmatch(str(node.value)))
        or isinstance(node, plain)
        for node in nodes
    ) and not any(_is_tower(node) for node in nodes)


def _is_tower(node: ast.AST) -> bool:
    """Whether `node` is a power that may be huge: of another power's power, or of more than 64."""
    if not isinstance(node, ast.Call) or not _POWERS.search(ast.unparse(node.func)):
        return isinstance(node, ast.keyword) and not _SMALL.fullmatch(ast.unparse(node.value))
    exponent = ast.unparse(node.args[1]) if len(node.args) == 2 else ""
    below = [len(_POWERS.findall(ast.unparse(arg))) for arg in node.args[:1]]
    return not _EXPONENT.fullmatch(exponent) or max(below, default=0) > 1


@contextmanager
def _weights_only() -> Iterator[None]:
    """Every torch.load unpickles tensors alone, whatever it is asked for (the example inputs)."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)

    def restore() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    with alone(), at_last(restore):
        os.environ[name] = "1"
        yield
