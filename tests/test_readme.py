import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example_for_nnx_one_for_linen_and_one_for_a_mesh():
    assert ["nnx" in example for example in EXAMPLES] == [True, False, True]
    assert "jmoe.linen" in EXAMPLES[1]
    assert "jmoe.parallel" in EXAMPLES[2]


@pytest.mark.parametrize("example", EXAMPLES, ids=["nnx", "linen", "mesh"])
def test_the_examples_run(example):
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["y"].shape == scope["x"].shape
    assert "loss" not in scope or float(scope["loss"]) > 0


def test_every_file_that_it_names_exists():
    names = re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"experiments/\w+\.py", README)
    assert len(names) > 4
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_commands_that_it_shows_are_those_of_the_command_line(capsys):
    from jmoe.cli.main import COMMANDS, main

    shown = set(re.findall(r"(?:^|bin/)jmoe (\w+)", README, re.MULTILINE))
    assert shown == set(COMMANDS)
    for command in shown:
        assert main([command, "--help"]) == 0
        assert "example:" in capsys.readouterr().out
