"""Imports point one way. What a lower part needs from a higher one is passed to it as an argument."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path for package in ("jmoe", "kernels_pallas") for path in (ROOT / package).rglob("*.py"))

LEAVES = {"notation", "errors", "paths", "_version"}
LINE = ("kernels_pallas", "routing", "dispatch", "nn", "models")  # each may import those before it
BESIDE = {"data", "parallel"}  # know no model; they meet it in train
AFTER_MODELS = {"evaluate", "convert", "analysis"}  # know not each other

MAY_IMPORT = {"kernels_pallas": set()} | dict.fromkeys(LEAVES, LEAVES)
MAY_IMPORT |= {part: LEAVES | set(LINE[:i]) for i, part in enumerate(LINE) if i}
MAY_IMPORT |= {"data": LEAVES, "parallel": LEAVES | {"kernels_pallas"}}
MAY_IMPORT |= {"linen": MAY_IMPORT["models"]} | {part: LEAVES | set(LINE) for part in AFTER_MODELS}
MAY_IMPORT["train"] = LEAVES | set(LINE) | AFTER_MODELS | BESIDE
MAY_IMPORT["plan"] = MAY_IMPORT["train"] | {"train"}
MAY_IMPORT["cli"] = MAY_IMPORT["plan"] | {"plan"}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["__init__"] = LEAVES | set(LINE) | AFTER_MODELS | BESIDE | {"linen"}  # what `import jmoe` offers

PURE = {"jax", "jaxtyping", "numpy"}  # beside the standard library
THIRD_PARTY = dict.fromkeys(("kernels_pallas", "notation", "errors", "routing", "dispatch"), PURE)
THIRD_PARTY |= {part: PURE | {"flax"} for part in ("nn", "models", "linen")}  # all that `import jmoe` needs


def part_of(module: str) -> str:
    """The part of the house that a module of ours belongs to."""
    package, *names = module.split(".")
    return package if package == "kernels_pallas" else (names or ["__init__"])[0]


def module_of(path: pathlib.Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(source: str) -> list[tuple[int, str]]:
    """(line, module) of every import, also of those inside functions; of `from a import b` both a and a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            found.append((node.lineno, node.module))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def arrows_back(module: str, source: str) -> list[str]:
    """The imports of a module that its part may not have."""
    part = part_of(module)
    ours = [(line, name) for line, name in imports(source) if name.split(".")[0] in ("jmoe", "kernels_pallas")]
    # `from jmoe import x` names the part in its second form; alone, "jmoe" is what imports everything.
    from_root = {line for line, name in ours if name.startswith("jmoe.")}
    ours = [(line, name) for line, name in ours if name != "jmoe" or line not in from_root]
    allowed = MAY_IMPORT[part] | {part}
    return [f"line {line}: {part} imports {name}" for line, name in ours if part_of(name) not in allowed]


def strangers(module: str, source: str) -> list[str]:
    """The third-party packages that a light part should not need."""
    allowed = THIRD_PARTY.get(part_of(module))
    if allowed is None:
        return []
    packages = {name.split(".")[0] for _, name in imports(source)}
    return sorted(packages - allowed - set(sys.stdlib_module_names) - {"jmoe", "kernels_pallas"})


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_import_points_back(path):
    assert arrows_back(module_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_light_parts_need_only_jax_and_little_else(path):
    assert strangers(module_of(path), path.read_text()) == []


def test_files_of_both_packages_are_read():
    assert {"routing", "dispatch", "nn", "kernels_pallas"} <= {part_of(module_of(path)) for path in FILES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jmoe.routing.top_k", "import jmoe.dispatch"),
        ("jmoe.routing.top_k", "from jmoe.dispatch import api"),
        ("jmoe.routing.top_k", "from jmoe import dispatch"),
        ("jmoe.routing.top_k", "def f():\n    from jmoe.nn import moe"),
        ("jmoe.nn.moe", "from jmoe.parallel import mesh"),
        ("jmoe.data.pipeline", "from jmoe.routing import TopK"),
        ("jmoe.analysis.speed", "from jmoe.train.loop import train"),
        ("kernels_pallas.indexing", "from jmoe.notation import Array"),
        ("jmoe.nn", "import jmoe"),
    ],
)
def test_an_arrow_that_points_back_is_found(module, source):
    assert len(arrows_back(module, source)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jmoe.dispatch.gather", "from jmoe.routing.decision import Routing\nfrom kernels_pallas import gather_rows"),
        ("jmoe.train.loop", "from jmoe import data, evaluate\nfrom jmoe.train.step import step"),
        ("jmoe", "from jmoe.nn import MoEMlp"),
    ],
)
def test_an_arrow_that_points_on_is_fine(module, source):
    assert arrows_back(module, source) == []


def test_a_stranger_is_found():
    assert strangers("jmoe.routing.top_k", "import functools\nimport flax\nfrom jax import numpy") == ["flax"]
