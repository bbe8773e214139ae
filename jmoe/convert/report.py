"""What a conversion says on the way: the arrays of a model as a table, and its configuration in one line."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from jmoe.convert.api import Parameter


def table(parameters: Sequence[Parameter], *, everything: bool = False) -> str:
    """Returns a line for every array with its name, shape and dtype, and their totals below.

    Arrays that differ only in the number of their block share a line, unless everything is asked for; then the name in
    the file stands beside ours.
    """
    if everything:
        rows = [
            (p.name, str(p.shape), p.dtype, p.source if p.source != p.name else "")
            for p in sorted(parameters, key=_order)
        ]
    else:
        blocks: dict[tuple[str, str, str], list[str]] = {}
        for p in sorted(parameters, key=_order):
            number = re.match(r"blocks/(\d+)/", p.name)
            name = re.sub(r"^blocks/\d+/", "blocks/{}/", p.name)
            blocks.setdefault((name, str(p.shape), p.dtype), []).extend([number[1]] if number else [])
        rows = [
            (name.format(f"{{{','.join(i)}}}" if len(i) > 1 else "".join(i)), *rest)
            for (name, *rest), i in blocks.items()
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total, size = sum(math.prod(p.shape) for p in parameters), 4 * sum(math.prod(p.shape) for p in parameters)
    return "\n".join([*lines, f"{len(parameters)} arrays, {total:,} parameters, {size / 1e6:,.1f} MB in float32"])


def _order(parameter: Parameter) -> list[Any]:
    """Numbers of blocks count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parameter.name.split("/")]


def brief(config: Any) -> str:
    """Returns a configuration as one would write it, without the options that have their defaults."""
    if isinstance(config, tuple):
        return f"({', '.join(map(brief, config))}{',' if len(config) == 1 else ''})"
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return repr(config)
    options = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            options.append(f"{field.name}={brief(value)}")
    return f"{type(config).__name__}({', '.join(options)})"
