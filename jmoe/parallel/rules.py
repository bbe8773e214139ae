"""Where parameters are kept: rules from the name of a parameter to the mesh axes along which it is divided.

Modules name no axis. A rule is a regular expression, searched for anywhere in a name such as
'blocks/5/moe/experts/w_in', and one mesh axis (or None, or several) for each axis of the array; the first rule that
matches counts. A parameter that no rule matches is kept whole on every device.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.errors import UserError
from jmoe.paths import path_names

logger = logging.getLogger("jmoe")

Axis = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Axis, ...]]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Expert parallel, fully sharded data parallel and tensor parallel at once; an axis of size 1 divides nothing.
# In tensor parallel the first matrix is cut by columns and the second by rows, so that only their result is summed.
RULES: tuple[Rule, ...] = (
    (r"experts/w_in$", ("expert", "fsdp", "model")),  # [E, D, F]
    (r"experts/w_out$", ("expert", "model", "fsdp")),  # [E, F, D]
    (r"experts/b_in$", ("expert", "model")),  # [E, F]
    (r"experts/b_out$", ("expert", None)),  # [E, D]
    (r"mlp/w_in$", ("fsdp", "model")),  # [D, F]
    (r"mlp/w_out$", ("model", "fsdp")),  # [F, D]
    (r"mlp/b_in$", ("model",)),
    (r"attention/(query|key|value)/kernel$", ("fsdp", "model", None)),  # [D, heads, D / heads]
    (r"attention/(query|key|value)/bias$", ("model", None)),
    (r"attention/out/kernel$", ("model", None, "fsdp")),  # [heads, D / heads, D]
    (r"(^|/)head/kernel$", ("fsdp", "model")),  # [D, classes]
    (r"(^|/)head/bias$", ("model",)),
    (r"pre_logits/kernel$", ("fsdp", None)),
    (r"patches/kernel$", (None, None, None, "fsdp")),  # [height, width, channels, D]
    # What is small: kept whole.
    (r"gate/(kernel|mu|scale)$", ()),
    (r"(b_out|/bias|/scale|cls|positions|probe)$|^(cls|positions)$", ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """What the rules say about the parameters of a model.

    Attributes:
      specs: for each name the mesh axes of its array axes.
      unmatched: names that no rule matches; they are kept whole.
      unused: regular expressions that match no name.
      whole: (name, array axis, mesh axis) for every array axis that its mesh axis does not divide and that is
        therefore kept whole.
    """

    specs: Mapping[str, PartitionSpec]
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]
    whole: tuple[tuple[str, int, str], ...]

    def report(self) -> list[str]:
        """A sentence for everything that one might not have meant."""
        lines = []
        if self.unmatched:
            lines.append(f"No sharding rule matches {_some(self.unmatched)}: kept whole on every device.")
        if self.unused:
            lines.append(f"Sharding rules that match no parameter: {_some(self.unused)}.")
        if self.whole:
            shown = [f"axis {axis} of {name} over {mesh_axis!r}" for name, axis, mesh_axis in self.whole]
            lines.append(f"Sizes that the mesh does not divide, kept whole: {_some(shown, quote=False)}.")
        return lines


def place(shapes: Mapping[str, tuple[int, ...]], mesh: AnyMesh, rules: Sequence[Rule] = RULES) -> Placement:
    """Applies rules to parameters.

    Args:
      shapes: the shape of each parameter, by name.
      mesh: with the axes that the rules name.
      rules: the first that matches a name counts.

    Raises:
      UserError: a rule is no regular expression, names an axis that the mesh lacks, or has more axes than the array.
    """
    compiled = [_compile(rule, mesh) for rule in rules]
    specs, unmatched, whole, used = {}, [], [], set()
    for name, shape in shapes.items():
        i = next((i for i, (pattern, _) in enumerate(compiled) if pattern.search(name)), None)
        if i is None:
            unmatched.append(name)
            specs[name] = PartitionSpec()
            continue
        used.add(i)
        axes = compiled[i][1]
        if len(axes) > len(shape):
            raise UserError(
                f"The sharding rule {rules[i][0]!r} has {len(axes)} axes, {axes}; {name} has the shape {shape}."
            )
        kept = []
        for axis, (size, names) in enumerate(zip(shape, axes, strict=False)):
            parts = math.prod(mesh.shape[n] for n in _names(names))
            if size % parts:
                whole.append((name, axis, "+".join(_names(names))))
            kept.append(None if size % parts or parts == 1 else names)
        specs[name] = PartitionSpec(*kept)
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    return Placement(specs=specs, unmatched=tuple(unmatched), unused=tuple(unused), whole=tuple(whole))


def shardings(tree: Any, mesh: AnyMesh, rules: Sequence[Rule] = RULES) -> Any:
    """Returns a tree of `NamedSharding`s for a tree of parameters, such as `nnx.state(model)` or Linen's variables.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`s.
      mesh: of `build`.
      rules: the first that matches a name counts.

    Raises:
      UserError: as `place`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    names = path_names(tree)
    placement = place({name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}, mesh, rules)
    return treedef.unflatten([NamedSharding(mesh, placement.specs[name]) for name in names])


def state_shardings(params: Any, state: Any, mesh: AnyMesh, rules: Sequence[Rule] = RULES) -> Any:
    """Shardings for everything that goes with parameters: an optimizer's state above all.

    A leaf whose name ends with that of a parameter lies as this does, or, if it has lost an axis of it (the factors of
    Adafactor's second moment), as the axes that are left. Everything else is kept whole.

    Args:
      params: the parameters.
      state: a tree in which their names recur, such as 'optimizer/mu/' + name.
      mesh: of `build`.
      rules: for the parameters.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in zip(path_names(params), jax.tree.leaves(params), strict=True)}
    specs = place(shapes, mesh, rules).specs
    leaves, treedef = jax.tree.flatten(state)

    def of(name: str, shape: tuple[int, ...]) -> PartitionSpec:
        parts = name.split("/")
        owner = next((n for i in range(len(parts)) if (n := "/".join(parts[i:])) in shapes), None)
        return PartitionSpec() if owner is None else _of_part(shapes[owner], specs[owner], shape)

    found = [of(name, tuple(leaf.shape)) for name, leaf in zip(path_names(state), leaves, strict=True)]
    return treedef.unflatten([NamedSharding(mesh, spec) for spec in found])


def _of_part(shape: tuple[int, ...], spec: PartitionSpec, part: tuple[int, ...]) -> PartitionSpec:
    """The spec of an array that has the shape of a parameter, or all axes of it but one."""
    if part == shape:
        return spec
    axes = (*spec, *[None] * (len(shape) - len(spec)))
    for axis in reversed(range(len(shape))):
        if shape[:axis] + shape[axis + 1 :] == part:
            return PartitionSpec(*axes[:axis], *axes[axis + 1 :])
    return PartitionSpec()


def _compile(rule: Rule, mesh: AnyMesh) -> tuple[re.Pattern[str], tuple[Axis, ...]]:
    pattern, axes = rule
    unknown = [name for names in axes for name in _names(names) if name not in mesh.shape]
    if unknown:
        raise UserError(
            f"The sharding rule {pattern!r} names the mesh axis {unknown[0]!r}; the mesh has "
            f"{', '.join(map(repr, mesh.shape))}."
        )
    try:
        return re.compile(pattern), axes
    except re.error as error:
        raise UserError(f"The sharding rule {pattern!r} is not a regular expression: {error}.") from None


def _names(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _some(names: Sequence[str], quote: bool = True) -> str:
    shown = [repr(name) if quote else name for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
