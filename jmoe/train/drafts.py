"""Configuration classes that are still to be built, and how a value is made to fit an option's annotation."""

import collections.abc
import dataclasses
import difflib
import inspect
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from jmoe.errors import UserError

ABSENT = object()  # stands for a value that was never given, where None would be a value


@dataclasses.dataclass(frozen=True)
class Draft:
    """A dataclass with some of its options, to be built when all edits are in.

    Attributes:
      cls: the dataclass.
      values: its options as far as they are given; they may hold drafts in turn.
      origins: the texts that asked for it, such as "--set seed=3"; they end up in the sentence of an error.
    """

    cls: type
    values: dict[str, Any]
    origins: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"


def draft_of(config: Any) -> Draft:
    """Returns the draft that would build an equal configuration."""
    return Draft(type(config), {field.name: getattr(config, field.name) for field in fields(type(config))}, ())


class MisfitError(Exception):
    """A value does not fit an annotation; caught where the sentence about it can be written."""


def build(node: Any) -> Any:
    """Returns the node with every draft in it built, innermost first.

    Raises:
      UserError: an option without a default is missing, or the class refuses its options with a ValueError.
    """
    if isinstance(node, tuple | list):
        built = [build(element) for element in node]
        return node if all(a is b for a, b in zip(node, built, strict=True)) else type(node)(built)
    if isinstance(node, dict):
        return {key: build(value) for key, value in node.items()}
    if not isinstance(node, Draft):
        return node
    values = {name: build(value) for name, value in node.values.items()}
    origins = ", ".join(dict.fromkeys(node.origins))
    for field in fields(node.cls):
        if field.name not in values and default(node.cls, field.name) is ABSENT:
            raise UserError(f"{node.cls.__name__} needs a value for '{field.name}' (from {origins}).")
    try:
        return node.cls(**values)
    except ValueError as error:
        raise UserError(f"{error} (from {origins})") from error


def is_config(value: Any) -> bool:
    """Returns whether the value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields(cls: Any) -> list[dataclasses.Field]:
    """Returns the fields of a dataclass that are options: those that its constructor takes."""
    return [field for field in dataclasses.fields(cls) if field.init]


def default(cls: type, option: str) -> Any:
    """Returns the option's default, or ABSENT if it must be given."""
    field = next(field for field in fields(cls) if field.name == option)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else field.default


def annotation(cls: type, option: str) -> Any:
    """Returns the option's annotation, or Any where it names what only type checkers import."""
    owner = next(base for base in cls.__mro__ if option in inspect.get_annotations(base))
    # One option alone, and not through the class: a class that is marked no_type_check has no hints.
    alone = types.SimpleNamespace(__annotations__={option: inspect.get_annotations(owner)[option]})
    try:
        return typing.get_type_hints(alone, globalns=vars(sys.modules[owner.__module__]))[option]
    except NameError:
        return Any


def check_option(cls: type, name: str, origin: str) -> None:
    """Raises a UserError unless the dataclass has the option; the origin says who asked for it."""
    options = [field.name for field in fields(cls)]
    if name not in options:
        raise UserError(
            f"{cls.__name__} has no option '{name}' (from {origin}).{did_you_mean(name, options)} "
            f"Its options are: {', '.join(options) or 'none'}."
        )


def fit_option(value: Any, cls: type, option: str, origin: str) -> Any:
    """Returns the value as the option's annotation wants it, or raises a UserError that says what it wants."""
    hint = annotation(cls, option)
    try:
        return fit(value, hint)
    except MisfitError:
        raise wrong_type(f"{cls.__name__}.{option}", hint, value, origin) from None


def wrong_type(owner: str, hint: Any, value: Any, origin: str) -> UserError:
    """Returns the error for a value that does not fit the annotation of its owner, such as "TopK.k"."""
    literals = [arm for arm in arms(hint) if typing.get_origin(arm) is typing.Literal]
    choices = [str(choice) for arm in literals for choice in typing.get_args(arm)]
    came = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return UserError(
        f"{owner} must be {describe(hint)}, not {came} (from {origin}).{did_you_mean(str(value), choices)}"
    )


def fit(value: Any, hint: Any) -> Any:
    """Returns the value as the annotation wants it: 1 as 1.0, 2.0 as 2, a list as a tuple, text as a path.

    An annotation that is not understood accepts everything: the class itself checks what it needs.

    Raises:
      MisfitError: the value does not fit.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if isinstance(hint, typing.NewType):
        return fit(value, hint.__supertype__)
    if origin in (typing.Union, types.UnionType):
        fitted = [fit(value, arm) for arm in args if fits(value, arm)]
        unchanged = [result for result in fitted if type(result) is type(value) and result == value]
        if fitted:
            return (unchanged or fitted)[0]
    elif origin is typing.Literal:
        if any(type(choice) is type(value) and choice == value for choice in args):
            return value
    elif hint is float:
        if type(value) is float or (type(value) is int and value.bit_length() <= sys.float_info.max_exp):
            return float(value)
    elif hint is int:
        if type(value) is int or (type(value) is float and value.is_integer()):
            return int(value)
    elif hint in (bool, str, None, types.NoneType):
        if type(value) is (hint or types.NoneType):
            return value
    elif hint is tuple or origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        fixed = origin is tuple and args[-1:] != (...,)
        if isinstance(value, tuple | list) and not (fixed and len(args) != len(value)):
            elements = [fit(element, element_hint(hint, i)) for i, element in enumerate(value)]
            return elements if origin is list else tuple(elements)
    elif origin in (dict, collections.abc.Mapping):
        if isinstance(value, dict):
            return {fit(key, args[0]): fit(element, args[1]) for key, element in value.items()}
    elif _is_callable(hint):
        if "__call__" in _members(value.cls) if isinstance(value, Draft) else callable(value):
            return value
    elif isinstance(hint, type) and origin is None:
        cls = value.cls if isinstance(value, Draft) else type(value)
        if issubclass(hint, pathlib.PurePath) and isinstance(value, str):
            return hint(value)
        if getattr(hint, "_is_protocol", False):
            wanted = {name for name in _members(hint) if name == "__call__" or not name.startswith("_")}
            if dataclasses.is_dataclass(cls) and wanted <= _members(cls):
                return value
        elif issubclass(cls, hint):
            return value
    else:
        return value
    raise MisfitError


def fits(value: Any, hint: Any) -> bool:
    """Returns whether the value fits the annotation."""
    try:
        fit(value, hint)
    except MisfitError:
        return False
    return True


def _members(cls: type) -> set[str]:
    """The names that a class and its bases define, leaving out what every class has."""
    bases = [base for base in cls.__mro__ if base not in (object, typing.Protocol, typing.Generic)]
    return {name for base in bases for name in (*vars(base), *inspect.get_annotations(base))}


def _is_callable(hint: Any) -> bool:
    return typing.get_origin(hint) is collections.abc.Callable or hint in (Callable, typing.Callable)


def arms(hint: Any) -> tuple[Any, ...]:
    """Returns the alternatives of a union, or the annotation itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def element_hint(hint: Any, i: int) -> Any:
    """Returns the annotation of entry i of a tuple or list; of a dictionary's values for i = 1."""
    for arm in arms(hint):
        args = typing.get_args(arm)
        if args and typing.get_origin(arm) is not typing.Literal:
            is_uniform = args[-1] is ... or typing.get_origin(arm) not in (tuple, dict, collections.abc.Mapping)
            return args[0] if is_uniform else args[i] if i < len(args) else Any
    return Any


def describe(hint: Any) -> str:
    """Returns what fits the annotation, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    plain = {float: "a number", int: "an integer", bool: "true or false", str: "text", types.NoneType: "None"}
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if hint in plain:
        return plain[hint]
    if _is_callable(hint):
        return "something that can be called, such as a configuration Name(...)"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"a {hint.__name__}(...)"
    if isinstance(hint, type) and origin is None:
        return f"a {hint.__name__}"
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the choice nearest to the word, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
