r"""Which array of a checkpoint becomes which array of a model: rules that rename, drop and transform.

A rule is (regular expression, replacement, transform, *arguments), the last two optional. For each array of the source
the first rule counts whose expression is found anywhere in its name. Its new name is the old one with every match
replaced, so text outside a match is kept:

    ("^head/", None)                                            drops the array
    ("^Transformer/(.*)$", r"params/Encoder/\1")                   renames it
    ("mlp/", "moe/experts/", "expand_tile", 0, 8)               and copies it to 8 experts: sparse upcycling

These are the rules, and the results, of the published trainer's initialisation from other checkpoints.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jmoe.convert.positions import resize_positions, square_grid, zoom
from jmoe.errors import UserError
from jmoe.notation import Shaped

# How many arguments each transform takes, at least and at most.
_ARGUMENTS = {"reshape": (0, 1), "squeeze": (1, 1), "stack": (1, 1), "expand_tile": (2, 2), "zoom": (0, 0)}
_ARGUMENTS |= {"vit_zoom": (0, 0)}
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What becomes of the arrays in whose name the pattern is found.

    Attributes:
      pattern: regular expression.
      replacement: what takes the place of every match in the name; with `\1` and the like for groups. None or "" drops
        the array, unless there is a transform.
      transform: what happens to the array on the way; None copies it. One of
        "reshape" (shape; by default that of the target),
        "squeeze" (axis),
        "stack" (axis): all arrays that get the same new name, in natural order of their old ones,
        "expand_tile" (axis or axes, repetitions): new axes along which the array is repeated,
        "zoom": linear interpolation to the shape of the target (`jmoe.convert.positions.zoom`),
        "vit_zoom": the same for learned positions of a square grid [1, N, D], the class token's row apart.
      arguments: of the transform.
    """

    pattern: str
    replacement: str | None = None
    transform: str | None = None
    arguments: tuple[Any, ...] = ()

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"The rule {self} has no regular expression: {error}.") from None
        if self.transform is None:
            return
        if self.transform not in _ARGUMENTS:
            raise UserError(f"The rule {self} has an unknown transform; use one of {', '.join(_ARGUMENTS)}.")
        least, most = _ARGUMENTS[self.transform]
        if not least <= len(self.arguments) <= most or self.replacement is None:
            raise UserError(f"The rule {self} wants a replacement and {least} to {most} arguments of its transform.")

    def __str__(self) -> str:
        transform = () if self.transform is None else (self.transform, *self.arguments)
        return str((self.pattern, self.replacement, *transform))

    @property
    def drops(self) -> bool:
        """Whether the arrays are left out."""
        return not self.replacement and self.transform is None

    def rename(self, name: str) -> str:
        """The new name of an array."""
        try:
            return re.sub(self.pattern, self.replacement or "", name)
        except (re.error, IndexError) as error:
            raise UserError(f"The replacement of the rule {self} does not fit its expression: {error}.") from None


Rules = Sequence[Rule | Sequence[Any]]


def parse_rules(rules: Rules) -> tuple[Rule, ...]:
    """Returns the rules that are sequences, as a JSON file has them, as `Rule`s.

    Raises:
      UserError: a rule that is none; the sentence shows it.
    """
    parsed = []
    for rule in rules:
        if isinstance(rule, Rule):
            parsed.append(rule)
            continue
        if isinstance(rule, str) or len(rule) < 2 or not isinstance(rule[0], str):
            raise UserError(f"A rule is (regular expression, replacement, transform, *arguments), not {rule!r}.")
        pattern, replacement, *transform = rule
        parsed.append(Rule(pattern, replacement, *transform[:1], arguments=tuple(map(_hashable, transform[1:]))))
    return tuple(parsed)


def apply_rules(
    source: Mapping[str, np.ndarray],
    target: Mapping[str, np.ndarray | jax.ShapeDtypeStruct],
    rules: Rules,
    *,
    cast: bool = True,
    broadcast: bool = False,
    keep_unmatched_names: bool = False,
    keep_unmatched_targets: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the arrays of the target with the values that the rules find for them in the source.

    Args:
      source: arrays by name. They are looked up one at a time, in natural order, so it may read them when asked.
      target: arrays by name, or their shapes and dtypes.
      rules: see above.
      cast: whether a value may have another dtype than its target, and is cast.
      broadcast: whether it may have another shape, and is broadcast.
      keep_unmatched_names: whether an array that no rule matches keeps its name, instead of being an error.
      keep_unmatched_targets: whether arrays of the target that get no value keep theirs, instead of being an error.

    Raises:
      UserError: something does not fit; the sentence names the arrays.
    """
    parsed = parse_rules(rules)
    found: dict[str, tuple[Rule, list[np.ndarray]]] = {}
    for name in sorted(source, key=natural_key):
        rule = next((rule for rule in parsed if re.search(rule.pattern, name)), None)
        if rule is None and not keep_unmatched_names:
            raise UserError(f"No rule matches {name!r} of the source. Add one; an empty replacement drops it.")
        if rule is not None and rule.drops:
            continue
        new = name if rule is None else rule.rename(name)
        rule = rule or Rule("", "")  # copies
        if new not in target:
            raise UserError(f"{name!r} of the source becomes {new!r}, which the target lacks.")
        if new in found and not rule.transform == found[new][0].transform == "stack":
            raise UserError(f"{name!r} is not the only array of the source that becomes {new!r}.")
        found.setdefault(new, (rule, []))[1].append(np.asarray(source[name]))
    kept = {name: value for name, value in target.items() if name not in found}
    if kept and not keep_unmatched_targets:
        raise UserError(f"The source has nothing for {', '.join(map(repr, kept))} of the target.")
    if valueless := [name for name, value in kept.items() if isinstance(value, jax.ShapeDtypeStruct)]:
        raise UserError(f"Neither source nor target has a value for {', '.join(map(repr, valueless))}.")

    result = {name: np.asarray(value) for name, value in kept.items()}
    for name, (rule, values) in found.items():
        try:
            value = _transformed(rule, values, target[name])
        except (ValueError, TypeError) as error:
            raise UserError(f"{name!r} cannot be made by the rule {rule}: {error}") from error
        result[name] = _fitted(name, value, target[name], cast=cast, broadcast=broadcast)
    return {name: result[name] for name in target}


def _transformed(
    rule: Rule, values: list[np.ndarray], target: np.ndarray | jax.ShapeDtypeStruct
) -> Shaped[np.ndarray, "..."]:
    """The value that a rule makes of the arrays it matched; all but "stack" match one."""
    match rule.transform, *rule.arguments:
        case (None,):
            return values[0]
        case "reshape", *shape:
            return values[0].reshape((shape and shape[0]) or target.shape)
        case "squeeze", axis:
            return values[0].squeeze(axis)
        case "stack", axis:
            return np.stack(values, axis)
        case "expand_tile", axis, repetitions:
            return expand_tile(values[0], axis, repetitions)
        case ("zoom",):
            return zoom(values[0], target.shape)
        case _:
            return _resized_positions(values[0], target)


def expand_tile(
    x: Shaped[np.ndarray, "..."], axis: int | Sequence[int], repetitions: int | Sequence[int]
) -> Shaped[np.ndarray, "..."]:
    """Inserts axes and repeats the array along them, in the simplest case into every expert.

    Args:
      x: an array.
      axis: where the new axes are in the result, one or several.
      repetitions: how often along each of them.
    """
    axes, counts = np.atleast_1d(axis).tolist(), np.atleast_1d(repetitions).tolist()
    expanded = np.expand_dims(x, tuple(axes))
    tiles = [1] * expanded.ndim
    for a, count in zip(axes, counts, strict=True):
        tiles[a] = count
    return np.tile(expanded, tiles)


def _resized_positions(source: np.ndarray, target: np.ndarray | jax.ShapeDtypeStruct) -> np.ndarray:
    """Positions of a square grid for another one; whether there is a class token, the number of rows says."""
    if source.ndim != 3 or len(target.shape) != 3 or source.shape[::2] != target.shape[::2] or source.shape[0] != 1:
        raise ValueError(f"positions are [1, N, D] with the same D, not {source.shape} and {target.shape}.")
    side, has_token = square_grid(target.shape[1])
    class_token = None
    if has_token:
        drawn = 0.02 * np.random.default_rng(0).normal(size=(1, 1, target.shape[2]))  # as new positions are
        class_token = np.asarray(drawn if isinstance(target, jax.ShapeDtypeStruct) else target[:, :1], source.dtype)
    return resize_positions(source, (side, side), class_token=class_token)


def _fitted(
    name: str, value: np.ndarray, target: np.ndarray | jax.ShapeDtypeStruct, *, cast: bool, broadcast: bool
) -> Shaped[np.ndarray, "..."]:
    """The value in dtype and shape of the target, if that is allowed."""
    if value.dtype != target.dtype and not cast:
        raise UserError(f"{name!r} is {target.dtype} in the target; the source has {value.dtype} for it.")
    if value.shape != target.shape:
        if not broadcast:
            raise UserError(f"{name!r} has shape {target.shape} in the target; the source has {value.shape} for it.")
        try:
            value = np.broadcast_to(value, target.shape)
        except ValueError:
            raise UserError(f"{name!r}: {value.shape} cannot be broadcast to {target.shape}.") from None
    return value.astype(target.dtype)


def natural_key(name: str) -> list[str | float]:
    """Sorts names by their text and, where they have numbers, by those: layer_2 before layer_10.

    A sign directly before the digits belongs to the number.
    """
    parts: list[str | float] = []
    for i, part in enumerate(_NUMBER.split(name)):
        parts.append(float(part) if i % 2 else part)
    return parts


def renumber_modules(names: Iterable[str]) -> dict[str, str]:
    """Returns the new name of each parameter of an old file, with modules numbered per type instead of per parent.

    Old files count all modules of a parent together: LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
    MlpBlock_3. New ones count each type on its own: LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1,
    MlpBlock_0. Names that are numbered so already stay as they are.

    Args:
      names: of all parameters of the file, with "/" between the parts.
    """
    names = list(names)
    children: dict[str, set[str]] = {}  # of each module, by its old path
    for name in names:
        parts = name.split("/")
        for i, part in enumerate(parts):
            children.setdefault("/".join(parts[:i]), set()).add(part)

    renamed: dict[tuple[str, str], str] = {}
    for parent, parts in children.items():
        counts: dict[str, int] = {}
        for part in sorted(parts, key=natural_key):
            if match := re.fullmatch(r"(.*)_\d+", part):
                renamed[parent, part] = f"{match[1]}_{counts.get(match[1], 0)}"
                counts[match[1]] = counts.get(match[1], 0) + 1
    return {name: _renumbered(name.split("/"), renamed) for name in names}


def _renumbered(parts: list[str], renamed: Mapping[tuple[str, str], str]) -> str:
    return "/".join(renamed.get(("/".join(parts[:i]), part), part) for i, part in enumerate(parts))


def _hashable(argument: Any) -> Any:
    return tuple(map(_hashable, argument)) if isinstance(argument, list | tuple) else argument
