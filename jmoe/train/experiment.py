"""Loads an experiment: a Python file with `get_config()`."""

import difflib
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any, TypeVar

from jmoe.errors import UserError
from jmoe.train.config_json import EXPERIMENT
from jmoe.train.overrides import apply_overrides

Config = TypeVar("Config")


def load_experiment(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Any:
    """Returns the TrainConfig of the experiment's `get_config()`, with the "a.b.c=value" overrides applied.

    Raises:
      UserError: the file does not exist, cannot be run, or has no `get_config()` that returns a TrainConfig; or an
        override is wrong. The sentence has the file and, where there is one, the line.
    """
    file = pathlib.Path(path)
    config = _configure(file)
    from jmoe.train.config import TrainConfig  # only now, so that a mistyped path is answered at once

    return _checked(file, config, TrainConfig, overrides)


def load_config(path: str | os.PathLike[str], kind: type[Config], overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration of a file whose `get_config()` makes one of the given class, like `load_experiment`."""
    file = pathlib.Path(path)
    return _checked(file, _configure(file), kind, overrides)


def _checked(file: pathlib.Path, config: Any, kind: type[Config], overrides: Sequence[str]) -> Config:
    if not isinstance(config, kind):
        came = "None" if config is None else f"a {type(config).__name__}"
        forgotten = " Did you forget the return?" if config is None else ""
        raise UserError(f"get_config() of {file} must return a {kind.__name__}, not {came}.{forgotten}")
    return apply_overrides(config, overrides)


def _configure(file: pathlib.Path) -> Any:
    """What the file's `get_config()` returns."""
    get_config = getattr(_run(file), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{file} has no function get_config(); an experiment defines one that returns a TrainConfig.")
    try:
        return get_config()
    except (Exception, SystemExit) as error:
        raise UserError(f"get_config() of {_where(file, error)} failed: {_sentence(file, error)}") from error


def _run(file: pathlib.Path) -> types.ModuleType:
    """Runs the file as a module of its own. It is compiled here, so no bytecode is written beside it."""
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        near = _nearest(file)
        raise UserError(f"There is no experiment '{file}'.{near}") from None
    except IsADirectoryError:
        near = _list(sorted(file.glob("*.py"))) or "(it has none)"
        raise UserError(f"'{file}' is a folder; name one of the experiments in it: {near}.") from None
    except OSError as error:
        raise UserError(f"The experiment '{file}' cannot be read: {error.strerror or error}.") from None
    if file.suffix != ".py":
        raise UserError(f"'{file}' is not a Python file; an experiment is a .py file with a function get_config().")
    module = types.ModuleType(f"{EXPERIMENT}{file.stem}")
    module.__file__ = os.fspath(file.absolute())
    # Dataclasses that the file defines look their module up by name, now and whenever their annotations are read.
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, module.__file__, "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{_where(file, error)} cannot be imported: {_sentence(file, error)}") from error
    return module


def _where(file: pathlib.Path, error: BaseException) -> str:
    """The file and the number of the line in it that the error passed last."""
    name = os.fspath(file.absolute())
    if isinstance(error, SyntaxError) and error.filename == name and error.lineno:
        return f"{file}, line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    return f"{file}, line {lines[-1]}," if lines else str(file)


def _sentence(file: pathlib.Path, error: BaseException) -> str:
    """The error on one line, without the place in the file, which `_where` tells."""
    line = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        line = line.removesuffix(f" ({file.name}, line {error.lineno})")
    if not isinstance(error, UserError):
        line = f"{type(error).__name__}: {line}".rstrip(": ")
    line = line if line.endswith((".", "?", "!", ")")) else f"{line}."
    if isinstance(error, ModuleNotFoundError):
        line += " If it is a part of training, this installs it: pip install 'jmoe[train]'"
    return line


def _nearest(file: pathlib.Path) -> str:
    """The experiments of the same folder and of ./experiments, the nearest name first if one is near."""
    found = [
        path
        for folder in dict.fromkeys((file.parent, pathlib.Path("experiments")))
        for path in sorted(folder.glob("*.py"))
        if not path.name.startswith("_")
    ]
    names = {path.stem: path for path in reversed(found)}
    near = difflib.get_close_matches(file.stem, names, n=3)
    if near:
        choices = [f"'{names[stem]}'" for stem in near]
        return f" Did you mean {' or '.join(choices)}?"
    return f" There are: {_list(found)}." if found else " It is the path of a .py file with a function get_config()."


def _list(paths: Sequence[pathlib.Path]) -> str:
    shown = ", ".join(str(path) for path in paths[:20])
    return f"{shown}, and {len(paths) - 20} more" if len(paths) > 20 else shown
