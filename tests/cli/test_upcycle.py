"""`jmoe convert --upcycle` as a user types it."""

import numpy as np
import pytest

from jmoe import ExpertChoice, TopK
from jmoe.cli.main import main
from jmoe.train.imported import load_model
from jmoe.train.overrides import apply_overrides
from tests.train.saved import save
from tests.train.tiny import tiny_config


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save(apply_overrides(tiny_config(), ["model.moe=none"]), folder)
    return str(folder)


def test_a_dense_run_becomes_a_sparse_model(dense, tmp_path, capsys):
    options = ["--experts", "5", "--layers", "0,1", "--router", "TopK(k=2, renormalize=true)", "--gate-std", "0.5"]
    more = ["--optimizer", "--seed", "3", "--set", "model.moe.images_per_group=4"]
    assert main(["convert", "--upcycle", dense, "--to", f"{tmp_path}/sparse", *options, *more]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "sparse           3,130 parameters; 5 experts in blocks 0, 1"  # 1,354 + 2 * (4 * 212 + 8 * 5)
    assert shown[2] == "optimizer        82 arrays"
    assert shown[-1] == f"written          {tmp_path}/sparse"
    model, params = load_model(tmp_path / "sparse")
    assert model.moe.router == TopK(k=2, renormalize=True)
    assert model.moe.images_per_group == 4
    assert np.std(params["blocks/0/moe/gate/kernel"]) > 0.2

    command = ["convert", "--upcycle", dense, "--to", f"{tmp_path}/sparse", "--layers", "1"]
    assert main(command) == 2
    assert "is not empty; say --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    model, params = load_model(tmp_path / "sparse")
    assert model.moe_layers == (1,)
    assert model.moe.num_experts == 32
    assert model.moe.router == ExpertChoice(capacity_factor=2.0, renormalize=True)  # as published for vision


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--router", "TopK(kk=2)"],
            "TopK has no option 'kk' (from --set model.moe.router=TopK(kk=2)). Did you mean 'k'?",
        ),
        (["--layers", "7"], "layers=(7,) must name blocks from 0 to 1, at least one. (from the upcycling of "),
        (
            ["--layers", "odd"],
            "layers='odd' must be 'last-n', 'every-n' or a tuple of blocks, such as 'last-2' or (5, 7).",
        ),
        (["--experts", "1", "--router", "TopK()"], "TopK has k=2, but there are only num_experts=1."),
        (
            ["--gate-std", "0"],
            "The gates want a standard deviation above 0, or nothing tells experts apart; it is 0.0.",
        ),
        (["--seed", "-1"], "The seed of the gates must be at least 0; it is -1."),
        (["--set", "model.width=32"], "more differ."),
        (["--all"], "--shards and --all are for --from; --upcycle writes a folder of jmoe."),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(dense, tmp_path, capsys, words, sentence):
    assert main(["convert", "--upcycle", dense, "--to", f"{tmp_path}/sparse", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_folders_of_jmoe_are_written_and_options_of_upcycling_are_for_it_alone(dense, tmp_path, capsys):
    assert main(["convert", "--upcycle", dense, "--to", "vmoe", f"{tmp_path}/sparse"]) == 2
    assert "--to knows no format 'vmoe'; the formats are jmoe." in capsys.readouterr().err
    assert main(["convert", "--from", dense, "--to", f"{tmp_path}/same", "--gate-std", "0.1"]) == 2
    assert "--gate-std is for --upcycle, which makes a dense model sparse." in capsys.readouterr().err
    assert main(["convert", "--from", dense, "--upcycle", dense, "--to", f"{tmp_path}/same"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
