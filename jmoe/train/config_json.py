"""A configuration as JSON: saved with a run, read back, and compared with another."""

import importlib
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jmoe.errors import UserError
from jmoe.train.drafts import ABSENT, Draft, build, check_option, draft_of, fit_option, is_config

TYPE = "$type"  # the key that names the class of an object
EXPERIMENT = "jmoe_experiment."  # begins the module name of an experiment's file (experiment.py)
FLOAT = "$float"  # the key of a number that JSON does not have: nan, inf, -inf


def to_json(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain JSON data, from which `from_json` builds an equal one.

    A dataclass becomes an object with its class under "$type" ("jmoe.routing.top_k:TopK"), a tuple a list, a path its
    text, and nan or an infinity {"$float": "nan"}.

    Raises:
      UserError: a field holds something else, such as a function or an array; the sentence names the field.
    """
    if not is_config(config):
        raise UserError(f"A configuration is a dataclass, not {config!r}.")
    return _to_json(config, "")


def _to_json(value: Any, path: str) -> Any:
    if is_config(value):
        options = {name: _to_json(option, _join(path, name)) for name, option in draft_of(value).values.items()}
        return {TYPE: f"{type(value).__module__}:{type(value).__qualname__}", **options}
    if isinstance(value, tuple | list):
        return [_to_json(element, _join(path, i)) for i, element in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _to_json(element, _join(path, key)) for key, element in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {FLOAT: str(float(value))}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, pathlib.PurePath):
        return str(value)
    raise UserError(
        f"{path} is {value!r}, which cannot be saved as JSON. A configuration holds numbers, text, paths, tuples, "
        "dictionaries with text keys, and dataclasses of these."
    )


def from_json(data: Any, modules: Sequence[str] = ()) -> Any:
    """Returns the configuration that `to_json` wrote; options it does not mention have their defaults.

    Args:
      data: what `to_json` returned.
      modules: modules whose dataclasses may be built, beside those of jmoe and of the experiments loaded so far. They
        must already be imported: nothing outside jmoe is imported because a file names it.

    Raises:
      UserError: a class or option that does not exist or is not allowed, or a value that does not fit.
    """
    if not isinstance(data, Mapping) or TYPE not in data:
        raise UserError(f'The saved configuration must be a JSON object with a "{TYPE}", not {str(data)[:60]}.')
    return build(_from_json(data, "", frozenset(modules)))


def _from_json(data: Any, path: str, modules: frozenset[str]) -> Any:
    if isinstance(data, list):
        return tuple(_from_json(element, _join(path, i), modules) for i, element in enumerate(data))
    if not isinstance(data, Mapping):
        return data
    if FLOAT in data:
        return float(data[FLOAT])
    values = {key: _from_json(value, _join(path, key), modules) for key, value in data.items() if key != TYPE}
    if TYPE not in data:
        return values
    origin = f"the saved configuration at {path}" if path else "the saved configuration"
    cls = _class_named(data[TYPE], origin, modules)
    for name, value in values.items():
        check_option(cls, name, origin)
        values[name] = fit_option(value, cls, name, origin)
    return Draft(cls, values, (origin,))


def _class_named(name: Any, origin: str, modules: frozenset[str]) -> type:
    """Returns the dataclass "module:Class" of jmoe, or of an allowed module that is already imported."""
    module_name, _, qualname = name.partition(":") if isinstance(name, str) else ("", "", "")
    found: Any = None
    if re.fullmatch(r"jmoe(\.[a-z]\w*)+", module_name):
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not module_name.startswith(str(error.name)):
                raise  # the module is there, but not something that it needs
    elif module_name in modules or module_name.startswith(EXPERIMENT):
        found = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and hasattr(found, "__dataclass_fields__") and found.__module__ == module_name:
        return found
    raise UserError(f"{name!r} is not a configuration class of jmoe or of a loaded experiment (from {origin}).")


def differences(a: Any, b: Any) -> list[str]:
    """Returns "path: a -> b" for every place where two results of `to_json` differ."""
    return list(_differences(a, b, ""))


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.get(TYPE) == b.get(TYPE) and FLOAT not in {*a, *b}:
        for key in [*a, *(key for key in b if key not in a)]:
            yield from _differences(a.get(key, ABSENT), b.get(key, ABSENT), _join(path, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, _join(path, i))
    elif a != b or isinstance(a, bool) != isinstance(b, bool):  # True == 1
        yield f"{path}: {_show(a)} -> {_show(b)}"


def _show(data: Any) -> str:
    """JSON data as one would write it in an experiment."""
    if data is ABSENT:
        return "(absent)"
    if isinstance(data, list):
        return f"({', '.join(map(_show, data))}{',' if len(data) == 1 else ''})"
    if isinstance(data, dict) and FLOAT in data:
        return data[FLOAT]
    if isinstance(data, dict) and TYPE in data:
        name = re.split(r"[:.]", data[TYPE])[-1]
        return f"{name}({', '.join(f'{key}={_show(value)}' for key, value in data.items() if key != TYPE)})"
    return repr(data)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
