"""Call what the user names as `package.module:factory` or `file.py:factory`.

The user names the code, so running it is meant; what it does wrong is told in one line.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from normswap.core.errors import NormswapError, told


def is_factory(reference: str) -> bool:
    """Whether `reference` has the form of a factory: a dotted module or a .py file, then a name."""
    where, _, name = reference.rpartition(":")
    dotted = all(part.isidentifier() for part in where.split("."))
    return name.isidentifier() and (where.endswith(".py") or dotted)


def call_factory(reference: str) -> Any:
    """What the factory returns when it is called without arguments.

    Raises:
        NormswapError: the module or the factory is not there, importing or calling it raises, or
            it needs arguments.
    """
    with _importable(reference):
        factory = _found(reference, "factory")
        _check_needs_nothing(factory, reference)
        try:
            return factory()
        except NormswapError:
            raise
        except (Exception, SystemExit) as error:
            raise NormswapError(
                f"{reference!r} raised {told(error)}; make it run on its own"
            ) from error


def function_named(reference: str) -> Any:
    """The function that `reference` names, which is not called.

    Raises:
        NormswapError: the module or the function is not there, or importing it raises.
    """
    with _importable(reference):
        return _found(reference, "function")


def _found(reference: str, what: str) -> Any:
    where, _, name = reference.rpartition(":")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found = getattr(module, name, None)
    if not callable(found):
        callables = [n for n in vars(module) if n[0] != "_" and callable(getattr(module, n))]
        raise NormswapError(f"{where!r} has no {what} {name!r}{nearest(name, callables)}")
    return found


def nearest(name: str, names: list[str]) -> str:
    """The end of a message about a wrong name: the closest of `names`, or some of them."""
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; it has {', '.join(sorted(names)[:8])}" if names else ""


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NormswapError(f"there is no file {str(path)!r}; check the path")
    # A name of its own: the stem may be that of an installed module.
    name = f"{path.stem}_{sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise NormswapError(
            f"importing {str(path)!r} raised {told(error)}; make it importable"
        ) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise NormswapError(
                f"there is no module {error.name!r}; install it, or run where it can be imported"
            ) from error
        raise NormswapError(f"importing {name!r} raised {told(error)}") from error
    except (Exception, SystemExit) as error:
        raise NormswapError(
            f"importing {name!r} raised {told(error)}; make it importable"
        ) from error


def _check_needs_nothing(factory: Any, reference: str) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-ins have none
        return
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise NormswapError(
            f"{reference!r} needs arguments ({', '.join(needed)}); name a function that takes none "
            "and returns what it builds"
        )


@contextmanager
def _importable(reference: str) -> Iterator[None]:
    """Let the user's code import its neighbours; last on the path, so that it hides nothing."""
    where = reference.rpartition(":")[0]
    folder = Path(where).absolute().parent if where.endswith(".py") else Path.cwd()
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
