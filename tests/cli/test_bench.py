import json
import re

import pytest

from jmoe.analysis import speed
from jmoe.cli.main import main


@pytest.fixture
def small(monkeypatch):
    case = speed.LayerCase(name="tiny", width=8, hidden_dim=16, tokens=5, images=4, num_experts=2)
    monkeypatch.setattr(speed, "CASES", {"tiny": case})


@pytest.mark.usefixtures("small")
def test_bench_prints_a_ratio_for_each_method(capsys):
    assert main(["bench", "layer", "--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["case", "dense", "ms", "gather", "einsum"]
    assert re.fullmatch(r"tiny +\d+\.\d( +\d+\.\d\d){2}", lines[2])
    assert main(["bench", "layer", "--runs", "1", "--json", "--method", "gather"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["ratios"].keys() == {"gather"}


@pytest.mark.usefixtures("small")
def test_a_case_or_method_that_does_not_exist_is_one_sentence(capsys):
    assert main(["bench", "layer", "--case", "S/16"]) == 2
    assert main(["bench", "layer", "--method", "gathr"]) == 2
    assert capsys.readouterr().err == (
        "jmoe: There is no case 'S/16' to time; use one of tiny.\n"
        "jmoe: There is no method 'gathr' to time; use one of auto, einsum, gather, ragged.\n"
    )
