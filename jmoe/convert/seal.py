"""A document that knows whether it is still what was written."""

import hashlib
import json
from collections.abc import Mapping

Content = Mapping[str, Mapping[str, str]]
FORMAT = 1


def seal(content: Content) -> str:
    """Returns named tables of text as JSON, together with their checksum."""
    return json.dumps({"format": FORMAT, "sha256": _digest(content), "content": content}, indent=1)


def unseal(text: str | bytes, tables: set[str]) -> Content:
    """Returns the tables of these names, as they were sealed; raises ValueError, in words, if the text is not that."""
    try:
        document = json.loads(text)
        content = document["content"]
        newer = document["format"] > FORMAT
        sound = document["format"] == FORMAT and document["sha256"] == _digest(content)
        sound &= content.keys() == tables
        sound &= all(isinstance(text, str) for table in content.values() for text in table.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("is damaged: it is not what was written") from None
    if not sound:
        raise ValueError("is of a newer jmoe; update jmoe" if newer else "is damaged: it is not what was written")
    return content


def _digest(content: Content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
