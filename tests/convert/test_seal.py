import hashlib
import json

import pytest

from jmoe.convert.seal import seal, unseal

TABLES = {"files": {"x.index": "ab12"}, "notes": {"model": "{}"}}


def sealed(content):
    """The checksum is right, the tables are not."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": 1, "sha256": digest, "content": content})


def test_what_was_sealed_comes_back():
    assert unseal(seal(TABLES), {"files", "notes"}) == TABLES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        b"\xff\xfe",
        "[" * 100_000,
        seal(TABLES).replace("ab12", "ab13"),
        seal(TABLES).replace('"notes"', '"nodes"'),
        seal({"files": {}}),
        sealed({"files": {}, "notes": []}),
        sealed({"files": {"a": 1}, "notes": {}}),
        json.dumps({"format": 1, "sha256": "", "content": 7}),
        json.dumps({"format": "1", "sha256": "", "content": TABLES}),
    ],
)
def test_anything_else_is_damaged(text):
    with pytest.raises(ValueError, match="^is damaged: it is not what was written$"):
        unseal(text, {"files", "notes"})


def test_a_newer_format_says_so():
    text = json.dumps(json.loads(seal(TABLES)) | {"format": 2})
    with pytest.raises(ValueError, match="^is of a newer jmoe; update jmoe$"):
        unseal(text, {"files", "notes"})
