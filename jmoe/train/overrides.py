"""Edits a configuration by dotted paths: `--set model.moe.router.k=1`.

Nothing here evaluates text as Python. Values are parsed with `ast`, and only literals and calls of known configuration
classes are understood. A class along an edited path is built anew once, after all edits, so that its `__post_init__`
sees them together and their order does not matter.
"""

import ast
import dataclasses
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jmoe.errors import UserError
from jmoe.train.config_json import EXPERIMENT
from jmoe.train.drafts import (
    ABSENT,
    Draft,
    MisfitError,
    annotation,
    arms,
    build,
    check_option,
    default,
    did_you_mean,
    draft_of,
    element_hint,
    fields,
    fit,
    fit_option,
    fits,
    is_config,
    wrong_type,
)

_WORDS = {"none": None, "true": True, "false": False}


def apply_overrides(config: Any, sets: Sequence[str], names: Mapping[str, type] | None = None) -> Any:
    """Returns the configuration with every "a.b.c=value" applied.

    Args:
      config: a dataclass; it is not changed.
      sets: edits. A path goes through dataclasses by option, through tuples by index (`data.augment.0.pixels=2`) and
        through dictionaries by key. An option that is None and can only be one dataclass becomes it
        (`initialize.path=runs/pretrained`). A value is a Python literal, a bare word (text, or true, false, none), or a
        call of a configuration class with literal arguments (`model.moe.router=Switch(jitter=0.01)`).
      names: the classes that a value may call; by default the dataclasses of jmoe (`public_classes`).

    Raises:
      UserError: an unknown option, a value that does not fit the option's annotation, or one that the class refuses.
    """
    for text in sets:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"'--set {text}' is not an edit. Write an option's path and its value: --set a.b.c=value.")
        classes = public_classes if names is None else lambda: names
        config = _Edit(path.strip(), value.strip(), f"--set {text}", classes).apply(config, Any, keys, "")
    return build(config)


def public_classes() -> dict[str, type]:
    """Returns by name the frozen dataclasses that jmoe, jmoe.data and jmoe.train export, then those of loaded modules.

    Loaded modules are those of jmoe and the experiments, so that a router of an experiment's own can be named too.
    """
    exporting = [importlib.import_module(name) for name in ("jmoe", "jmoe.data", "jmoe.train")]
    loaded = [module for name, module in sorted(sys.modules.items()) if name.startswith(("jmoe.", EXPERIMENT))]
    found: dict[str, type] = {}
    for module in exporting + loaded:
        for name in getattr(module, "__all__", None) or dir(module):
            value = getattr(module, name, None)
            is_frozen = getattr(getattr(value, "__dataclass_params__", None), "frozen", False)
            if isinstance(value, type) and is_frozen and not name.startswith("_"):
                found.setdefault(name, value)
    return found


@dataclasses.dataclass(frozen=True)
class _Edit:
    """One "path=text", where it came from, and the classes that its text may call, found when it names one."""

    path: str
    text: str
    origin: str
    classes: Callable[[], Mapping[str, type]]

    def apply(self, node: Any, hint: Any, keys: list[str], owner: str) -> Any:
        """Returns the node with the value put where the keys lead; the dataclasses on the way become drafts."""
        if not keys:
            return self._value(hint, owner)
        key, *rest = keys
        here = self.path.removesuffix(".".join(keys)).rstrip(".")  # the path of this node
        if is_config(node):
            node = node if isinstance(node, Draft) else draft_of(node)
            check_option(node.cls, key, self.origin)
            child = node.values[key] if key in node.values else default(node.cls, key)
            child = self.apply(child, annotation(node.cls, key), rest, f"{node.cls.__name__}.{key}")
            return Draft(node.cls, {**node.values, key: child}, (*node.origins, self.origin))
        if isinstance(node, tuple | list):
            if not (key.isascii() and key.isdecimal() and int(key) < len(node)):
                entries = f"entries 0 to {len(node) - 1}" if node else "no entries"
                raise UserError(f"{here} has {entries}, and '{key}' is none of them (from {self.origin}).")
            i = int(key)
            child = self.apply(node[i], element_hint(hint, i), rest, f"{here}.{i}")
            return type(node)([*node[:i], child, *node[i + 1 :]])
        if isinstance(node, dict):
            known = {str(k): k for k in node}
            if key not in known:
                raise UserError(
                    f"{here} has no entry '{key}' (from {self.origin}).{did_you_mean(key, known)} "
                    f"Its entries are: {', '.join(known) or 'none'}."
                )
            child = self.apply(node[known[key]], element_hint(hint, 1), rest, f"{here}.{key}")
            return {**node, known[key]: child}
        if node is None or node is ABSENT:
            classes = [arm for arm in arms(hint) if isinstance(arm, type) and dataclasses.is_dataclass(arm)]
            if len(classes) == 1:  # nothing else can be meant; what it needs beside, `build` will say
                return self.apply(Draft(classes[0], {}, (self.origin,)), hint, keys, owner)
            raise UserError(
                f"{here} is {'None' if node is None else 'not set'}, so it has no option '{key}' (from {self.origin}). "
                f'Set it first, with --set "{here}=Name(...)".'
            )
        raise UserError(f"{here} is {node!r}, which has no option '{key}' or any other (from {self.origin}).")

    def _value(self, hint: Any, owner: str) -> Any:
        """Returns the value as the annotation wants it; what fits in no other way is taken as text."""
        try:
            parsed = self._parse(hint)
        except UserError:
            if hint is str:
                return self.text
            raise
        is_special = re.fullmatch(r"[+-]?(inf|nan)", self.text.lower())  # floats, but no literals
        for candidate in ([float(self.text)] if is_special else []) + [parsed, self.text]:
            try:
                return fit(candidate, hint)
            except MisfitError:
                continue
        raise wrong_type(owner, hint, parsed, self.origin)

    def _parse(self, hint: Any) -> Any:
        """Returns the literal or the draft that the text stands for, or the text itself if it is neither."""
        text = self.text
        try:
            with warnings.catch_warnings(action="ignore"):  # about an odd escape in quoted text
                node = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            word = re.match(r"\w+(?=\()", text)
            if text.startswith(("(", "[", "{", "'", '"')) or (word and word[0] in self.classes()):
                reason = getattr(error, "msg", None) or type(error).__name__
                raise UserError(f"The value cannot be read: {reason} (from {self.origin}).") from None
            return text  # such as gs://bucket/run or train[:90%]
        is_number = isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
        if is_number or isinstance(node, ast.Constant | ast.Name | ast.Tuple | ast.List | ast.Dict | ast.Call):
            return self._literal(node, hint)
        return text  # such as B/16 or every-2

    def _literal(self, node: ast.expr, hint: Any) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
                return -number if isinstance(node.op, ast.USub) else number
            case ast.Name(id=word):
                if word[0].isupper() and word.lower() not in _WORDS and word in self.classes():
                    raise UserError(
                        f"{word} is a class; write it with its options, as {word}(...) (from {self.origin})."
                    )
                return _WORDS.get(word.lower(), word)
            case ast.Tuple() | ast.List():
                values = [self._literal(element, element_hint(hint, i)) for i, element in enumerate(node.elts)]
                return tuple(values) if isinstance(node, ast.Tuple) else values
            case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
                keys = [self._literal(key, Any) for key in node.keys if key]
                values = [self._literal(value, element_hint(hint, 1)) for value in node.values]
                return dict(zip(keys, values, strict=True))
            case ast.Call():
                return self._call(node, hint)
        raise UserError(
            f"'{ast.unparse(node)}' is no number, text, tuple or configuration (from {self.origin}). "
            "Put quotes around text."
        )

    def _call(self, node: ast.Call, hint: Any) -> Draft:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        classes = self.classes()
        if name not in classes:
            fitting = [known for known, cls in classes.items() if fits(Draft(cls, {}, ()), hint)] or classes
            raise UserError(
                f"There is no configuration class '{name}' (from {self.origin}).{did_you_mean(name, fitting)} "
                f"What fits here: {', '.join(sorted(fitting))}."
            )
        cls = classes[name]
        positional = [field.name for field in fields(cls) if not field.kw_only]
        if len(node.args) > len(positional):
            raise UserError(
                f"{name} takes {len(positional)} options without a name, not {len(node.args)} (from {self.origin}). "
                f"Its options are: {', '.join(field.name for field in fields(cls)) or 'none'}."
            )
        given = [*zip(positional, node.args, strict=False), *((word.arg, word.value) for word in node.keywords)]
        values: dict[str, Any] = {}
        for option, expression in given:
            if option is None or option in values:
                raise UserError(f"{name} takes each option once, as {name}(option=value) (from {self.origin}).")
            check_option(cls, option, self.origin)
            values[option] = fit_option(self._literal(expression, annotation(cls, option)), cls, option, self.origin)
        return Draft(cls, values, (self.origin,))
