"""Choosing the implementation of an op: by name, or the fastest that can take the arguments."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("kernels_pallas")
_said: set[tuple[str, str]] = set()


def choose(op: str, implementation: str | None, table: Mapping[str, Callable[..., Any]], preferred: str) -> Callable:
    """Returns table[implementation], or table[preferred] where None is given (said once in the log)."""
    if implementation is None:
        if (op, preferred) not in _said:
            _said.add((op, preferred))
            logger.info("%s runs as %r here.", op, preferred)
        return table[preferred]
    if implementation not in table:
        raise NotImplementedError(
            f"{op} has no implementation {implementation!r}; use one of {', '.join(map(repr, table))}, or None."
        )
    return table[implementation]
