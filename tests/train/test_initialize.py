import dataclasses
import json
import logging
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jmoe.convert import api as convert
from jmoe.errors import UserError
from jmoe.models.vit import ViTConfig
from jmoe.train import loop
from jmoe.train.config import Initialize
from jmoe.train.initialize import below, start_from
from jmoe.train.overrides import apply_overrides
from tests.train.saved import STEP, assert_same, by_name, drawn, save, trained
from tests.train.tiny import tiny_config

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
FINE_TUNING = (  # 2 by 2 patches become 4 by 6
    "model.image_size=(16, 24)",
    "model.num_classes=7",
    "seed=1",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a run with a moving average, and the arrays in it by name."""
    folder = tmp_path_factory.mktemp("source")
    return folder, save(tiny_config(ema_decay=0.9), folder)


def started(folder, *changes, **options):
    """The arrays of a run of tiny_config with some changes that starts from a folder, and those it would have drawn."""
    config = apply_overrides(tiny_config(ema_decay=0.9), changes)
    state = drawn(config)
    return by_name(start_from(Initialize(path=str(folder), **options), config.model, state)), by_name(state)


def test_fine_tuning_resizes_positions_replaces_the_head_and_takes_the_rest(source):
    folder, saved = source
    state, before = started(folder, *FINE_TUNING)
    others = [name for name in state if name.startswith("params/") and "head" not in name and "positions" not in name]
    assert len(others) == 38
    for name in others:
        # Of the average, which is what was evaluated.
        assert_same(state[name], saved[name.replace("params/", "average/")])
    for name in ("params/head/kernel", "params/head/bias"):
        assert_same(state[name], before[name])

    was, now = np.asarray(saved["average/positions"]), np.asarray(state["params/positions"])
    assert now.shape == (1, 25, 8)
    assert_same(now[:, 0], was[:, 0])  # of the class token
    corners = now[0, 1:].reshape(4, 6, 8)[np.ix_([0, -1], [0, -1])]
    assert_same(corners, was[0, 1:].reshape(2, 2, 8))


def test_the_average_and_everything_else_begin_anew_in_fine_tuning(source):
    state, before = started(source[0], *FINE_TUNING)
    for name, value in state.items():
        if name.startswith("average/"):
            assert_same(value, state[name.replace("average/", "params/")])
        elif name.startswith(("step", "optimizer/")):
            assert_same(value, before[name])
    assert_same(jax.random.key_data(state["key"]), jax.random.key_data(before["key"]))


def test_going_on_with_the_optimizer_takes_everything_but_the_key(source):
    folder, saved = source
    state, before = started(folder, "seed=1", fresh=(), optimizer=True)
    for name, value in state.items():
        if name == "key":
            assert_same(jax.random.key_data(value), jax.random.key_data(before[name]))
        else:
            assert_same(value, saved[name])
    assert int(state["step"]) == int(state["optimizer/learning_rate/count"]) == STEP


def test_moments_of_what_is_fresh_or_resized_start_at_zero(source):
    folder, saved = source
    state, _ = started(folder, *FINE_TUNING, optimizer=True)
    for moment in ("mu", "nu"):
        for name in ("head/kernel", "head/bias", "positions"):
            assert not np.asarray(state[f"optimizer/direction/{moment}/{name}"]).any()
        moments = f"optimizer/direction/{moment}/blocks/1/moe/experts/w_in"
        assert_same(state[moments], saved[moments])
    assert_same(state["params/norm/scale"], saved["params/norm/scale"])
    assert_same(state["average/norm/scale"], saved["average/norm/scale"])


def test_the_log_says_what_came_from_where(source, caplog):
    caplog.set_level(logging.INFO, logger="jmoe")
    started(source[0], *FINE_TUNING)
    assert [record.getMessage() for record in caplog.records] == [
        f"Starts from the moving average of step 7 in {source[0]}: 38 arrays loaded as they are; positions resized "
        "from 2 by 2 to 4 by 6 patches; 1,872 parameters in all; fresh: head/bias, head/kernel; "
        "not used: head/bias, head/kernel.",
        "Options of the model, there -> here: num_classes: 10 -> 7; image_size.0: 8 -> 16; image_size.1: 8 -> 24.",
    ]


def test_a_class_token_comes_and_goes_with_its_position(tmp_path):
    mean = apply_overrides(tiny_config(), ["model.pool=mean"])
    saved = save(mean, tmp_path / "mean")
    state, before = started(tmp_path / "mean", fresh=("head", "cls"))
    assert_same(state["params/cls"], before["params/cls"])
    assert_same(state["params/positions"][:, 0], before["params/positions"][:, 0])
    assert_same(state["params/positions"][:, 1:], saved["params/positions"])

    saved = save(tiny_config(), tmp_path / "token")
    state, _ = started(tmp_path / "token", "model.pool=mean", drop=("cls",))
    assert_same(state["params/positions"], saved["params/positions"][:, 1:])


@pytest.mark.parametrize("format", ["vmoe", "safetensors"])
def test_a_run_can_start_from_files_of_other_programs(source, tmp_path, format):
    _, saved = source
    params = {name: np.asarray(value) for name, value in below("params", saved).items()}
    convert.save(format, tmp_path / "checkpoint", tiny_config().model, params)
    state, _ = started(tmp_path / "checkpoint", *FINE_TUNING, format=format)
    for name in params.keys() - {"head/kernel", "head/bias", "positions"}:
        assert_same(state[f"params/{name}"], params[name])
        assert_same(state[f"average/{name}"], params[name])
    assert int(state["step"]) == 0


def test_a_run_can_start_from_an_old_vit(tmp_path):
    with np.load(GOLDENS / "init_upcycle_vit_to_vmoe.npz") as file:
        arrays = {name.removeprefix("source/"): file[name] for name in file.files if name.startswith("source/")}
    np.savez(tmp_path / "vit.npz", **arrays)
    model = ViTConfig(patch_size=4, width=12, depth=2, hidden_dim=24, num_heads=2, num_classes=10, image_size=(8, 8))
    config = tiny_config(model=model)
    initialize = Initialize(path=str(tmp_path / "vit.npz"), format="vit")
    state = by_name(start_from(initialize, model, drawn(config)))
    block = "Transformer/encoderblock_1"
    for ours, theirs in (
        ("patches/kernel", "embedding/kernel"),
        ("blocks/1/norm_2/scale", f"{block}/LayerNorm_2/scale"),
        ("blocks/1/attention/out/kernel", f"{block}/MultiHeadDotProductAttention_1/out/kernel"),
        ("blocks/1/mlp/w_out", f"{block}/MlpBlock_3/Dense_1/kernel"),
    ):
        assert_same(state[f"params/{ours}"], arrays[theirs])
    assert state["params/positions"].shape == (1, 5, 12)  # of 17


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        (
            ["model.moe.num_experts=5"],
            {"fresh": ("head", "gate")},
            "'blocks/1/moe/experts/b_in' is float32 (3, 12) there and float32 (5, 12) in the model; "
            "'blocks/1/moe/experts/b_out' is float32 (3, 8) there and float32 (5, 8) in the model; "
            "'blocks/1/moe/experts/w_in' is float32 (3, 8, 12) there and float32 (5, 8, 12) in the model; "
            "'blocks/1/moe/experts/w_out' is float32 (3, 12, 8) there and float32 (5, 12, 8) in the model.",
        ),
        (
            ["model.moe=none"],
            {"drop": ("experts",)},
            "it lacks 'blocks/1/mlp/b_in', 'blocks/1/mlp/b_out', 'blocks/1/mlp/w_in', 'blocks/1/mlp/w_out', "
            "which 'fresh' would leave as drawn; "
            "the model lacks 'blocks/1/moe/gate/kernel', which 'drop' would leave out.",
        ),
        (
            ["model.representation_dim=3"],
            {"drop": ("^cls$",)},
            "it lacks 'cls', 'pre_logits/bias', 'pre_logits/kernel', which 'fresh' would leave as drawn.",
        ),
        (
            ["model.num_classes=7"],
            {"fresh": ()},
            "'head/bias' is float32 (10,) there and float32 (7,) in the model; "
            "'head/kernel' is float32 (8, 10) there and float32 (8, 7) in the model.",
        ),
    ],
    ids=str,
)
def test_what_differs_is_named(source, changes, options, sentence):
    with pytest.raises(UserError) as error:
        started(source[0], *changes, **options)
    assert str(error.value) == f"The run cannot start from {source[0]}: {sentence}"


def test_of_many_differences_the_first_are_named_and_the_others_counted(source):
    with pytest.raises(UserError) as error:
        started(source[0], "model.hidden_dim=16", "model.width=16")
    sentence = str(error.value)
    assert "key/bias' is float32 (2, 4) there and float32 (2, 8) in the model; " in sentence
    assert sentence.count(" in the model; ") == 5
    assert sentence.endswith(" more differ.")


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ([], {"fresh": ("haed",)}, "initialize.fresh has 'haed', which matches no parameter of the model. The nearest"),
        ([], {"drop": ("pre_logits",)}, "initialize.drop has 'pre_logits', which matches no parameter of .*source"),
        (
            ["optimizer=SGD(peak_lr=0.1)"],
            {"optimizer": True},
            "has the state of another optimizer: they differ in 'direction/count', 'direction/mu/blocks/0/attention/.*"
            "'direction/trace/positions'. Use the optimizer it was trained with, or set initialize.optimizer=false.",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_sentence(source, changes, options, sentence):
    with pytest.raises(UserError, match=sentence):
        started(source[0], *changes, **options)


def test_a_checkpoint_without_an_optimizer_cannot_be_gone_on_with(tmp_path):
    state = dataclasses.replace(trained(tiny_config()), optimizer=None)
    save(tiny_config(), tmp_path, state)
    with pytest.raises(UserError, match=r"has no optimizer state: set initialize\.optimizer=false\.$"):
        started(tmp_path, fresh=(), optimizer=True)


def test_what_is_not_there_or_damaged_is_one_sentence(source, tmp_path):
    with pytest.raises(UserError, match="nothing holds no checkpoints: it is neither the folder of a run nor a conv"):
        started(tmp_path / "nothing")
    copied = tmp_path / "copied"
    shutil.copytree(source[0], copied)
    (copied / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not a configuration of this jmoe: The saved config"):
        started(copied)
    largest = max((copied / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match="instead of"):
        started(copied)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "torch"}, "Initialize wants format to be one of 'jmoe', 'vmoe', 'vit', 'safetensors'; it got."),
        ({"format": "vit", "optimizer": True}, "A checkpoint of format 'vit' has no optimizer state: set optimizer=Fa"),
        ({"drop": ("(",)}, r"Initialize has '\(', which is not a regular expression: missing \)"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_options_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Initialize(path="x", **options)


@pytest.mark.slow
def test_a_run_that_starts_elsewhere_goes_on_and_when_it_is_resumed_needs_no_source(source, tmp_path):
    moved = tmp_path / "source"
    shutil.copytree(source[0], moved)
    config = apply_overrides(
        tiny_config(steps=9, ema_decay=0.9),
        [f"initialize.path={moved}", "initialize.fresh=()", "initialize.optimizer=true", "checkpoint.every=1"],
    )
    assert loop.train(config, tmp_path / "run").step == 9
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["8", "9"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rate = {line["step"]: line["train/learning_rate"] for line in lines if "train/loss" in line}
    # Linear from 0.01 at t = 2 to 0.00001 at 9; the update that makes step 8 is that of t = 7.
    assert rate == pytest.approx({8: 1e-5 + (0.01 - 1e-5) * 2 / 7, 9: 1e-5 + (0.01 - 1e-5) / 7})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["initialize"]["path"] == str(moved)

    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")
    shutil.rmtree(moved)
    assert loop.train(config, tmp_path / "run").resumed_from == 8


@pytest.mark.slow
def test_a_run_that_would_end_before_it_starts_is_refused(source, tmp_path):
    changes = [f"initialize.path={source[0]}", "initialize.fresh=()", "initialize.optimizer=true"]
    config = apply_overrides(tiny_config(steps=7, ema_decay=0.9), changes)
    with pytest.raises(UserError, match=r"was saved after step 7, and with initialize.optimizer .* but it has 7 steps"):
        loop.train(config, tmp_path)
