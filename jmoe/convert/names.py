"""Parameter names: ours, such as "blocks/5/moe/experts/w_in", and those of google-research/vmoe, in both directions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jmoe.errors import UserError

# Name of the reference, ours. {i} is the number of a block, {module} and {leaf} are any one part of a name. An array
# has the same shape on both sides: also the gate of an ensemble, [D, M, E / M].
_MLP = (("Dense_0/kernel", "w_in"), ("Dense_0/bias", "b_in"), ("Dense_1/kernel", "w_out"), ("Dense_1/bias", "b_out"))
_BLOCK = "Encoder/encoderblock_{i}"
_TABLE = (
    ("embedding/{leaf}", "patches/{leaf}"),
    ("cls", "cls"),
    ("Encoder/posembed_input/pos_embedding", "positions"),
    (f"{_BLOCK}/LayerNorm_0/{{leaf}}", "blocks/{i}/norm_1/{leaf}"),
    (f"{_BLOCK}/LayerNorm_1/{{leaf}}", "blocks/{i}/norm_2/{leaf}"),
    (f"{_BLOCK}/SelfAttention/{{module}}/{{leaf}}", "blocks/{i}/attention/{module}/{leaf}"),
    *((f"{_BLOCK}/Mlp/{theirs}", f"blocks/{{i}}/mlp/{ours}") for theirs, ours in _MLP),
    *((f"{_BLOCK}/Moe/Mlp/{theirs}", f"blocks/{{i}}/moe/experts/{ours}") for theirs, ours in _MLP),
    (f"{_BLOCK}/Moe/Router/dense/kernel", "blocks/{i}/moe/gate/kernel"),
    (f"{_BLOCK}/Moe/Router/mu", "blocks/{i}/moe/gate/mu"),
    (f"{_BLOCK}/Moe/Router/scale", "blocks/{i}/moe/gate/scale"),
    ("Encoder/encoder_norm/{leaf}", "norm/{leaf}"),
    ("MapHead/probe", "pool/probe"),
    ("MapHead/LayerNorm/{leaf}", "pool/norm/{leaf}"),
    ("MapHead/MultiHeadDotProductAttention/{module}/{leaf}", "pool/attention/{module}/{leaf}"),
    *((f"MapHead/Mlp/{theirs}", f"pool/mlp/{ours}") for theirs, ours in _MLP),
    ("pre_logits/{leaf}", "pre_logits/{leaf}"),
    ("head/{leaf}", "head/{leaf}"),
)
_PLACES = {"i": r"0|[1-9]\d*", "module": r"\w+", "leaf": r"\w+"}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", lambda place: f"(?P<{place[1]}>{_PLACES[place[1]]})", template))


_TO_OURS = [(_pattern(theirs), ours) for theirs, ours in _TABLE]
_TO_REFERENCE = [(_pattern(ours), theirs) for theirs, ours in _TABLE]


def our_name(reference_name: str) -> str | None:
    """Returns our name of a parameter of the reference, or None if it has none."""
    return _renamed(reference_name, _TO_OURS)


def reference_name(our_name: str) -> str | None:
    """Returns the reference's name of one of our parameters, or None if it has none."""
    return _renamed(our_name, _TO_REFERENCE)


def _renamed(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


def to_ours(arrays: Mapping[str, Any], origin: object) -> dict[str, Any]:
    """Returns arrays named as in the reference under our names, in their order.

    Args:
      arrays: by the reference's names.
      origin: the file they are from, for the sentence of an error.

    Raises:
      UserError: some have no name of ours; the message lists them.
    """
    return _rename_all(arrays, _TO_OURS, f"{origin} has arrays that are no parameters of a vision transformer of jmoe")


def to_reference(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters under the reference's names.

    Raises:
      UserError: the reference has no such parameters; the message lists them.
    """
    return _rename_all(params, _TO_REFERENCE, "The published layout has no place for the parameters")


def _rename_all(arrays: Mapping[str, Any], table: list[tuple[re.Pattern[str], str]], problem: str) -> dict[str, Any]:
    names = {name: _renamed(name, table) for name in arrays}
    if unmatched := [name for name, renamed in names.items() if renamed is None]:
        raise UserError(f"{problem}: {listed(unmatched)}.")
    return {renamed: arrays[name] for name, renamed in names.items() if renamed is not None}


def listed(names: Iterable[str], most: int = 30) -> str:
    """Returns names in quotes, one after the other; what is past `most` is counted."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def first_of(differences: Sequence[str], most: int = 5) -> list[str]:
    """Returns what differs, for a sentence that can be read to its end; what is past `most` is counted."""
    more = len(differences) - most
    return [*differences[:most], *([f"and {more} more differ"] if more > 0 else [])]


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings under their path, such as "blocks/5/moe/gate/kernel"; empty ones vanish."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mappings that `flatten` flattened."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
