import dataclasses

import numpy as np
import pytest

from jmoe import MoEConfig, TopK
from jmoe.errors import UserError
from jmoe.train import loop
from jmoe.train.config import Initialize
from jmoe.train.imported import save_model
from jmoe.train.initialize import start_from
from jmoe.train.overrides import apply_overrides
from jmoe.train.upcycle import upcycle_folder
from tests.train.saved import STEP, assert_same, by_name, drawn, save
from tests.train.tiny import tiny_config

MOE = MoEConfig(num_experts=3, router=TopK(k=1, renormalize=True), layers=(1,), images_per_group=4)


def dense_config(**changes):
    return apply_overrides(tiny_config(**changes), ["model.moe=none"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a dense run with a moving average, and the arrays in it by name."""
    folder = tmp_path_factory.mktemp("dense")
    return folder, save(dense_config(ema_decay=0.9), folder)


def started(folder, **options):
    """The arrays of a run that starts from what was written."""
    config = tiny_config(ema_decay=0.9)
    initialize = Initialize(path=str(folder), fresh=(), **options)
    return by_name(start_from(initialize, config.model, drawn(config)))


def test_the_optimizer_goes_on_with_the_moments_of_the_mlp_in_every_expert(dense, tmp_path):
    folder, saved = dense
    upcycle_folder(folder, tmp_path / "sparse", MOE, optimizer=True)
    state = started(tmp_path / "sparse", optimizer=True)
    for part in ("params", "average", "optimizer/direction/mu", "optimizer/direction/nu"):
        experts = [name for name in state if name.startswith(f"{part}/blocks/1/moe/experts/")]
        assert len(experts) == 4
        for name in experts:
            copies = np.asarray(state[name])
            assert copies.shape[0] == 3
            assert (copies == np.asarray(saved[name.replace("moe/experts", "mlp")])).all()
        for name in state:
            if name.startswith(f"{part}/") and "moe" not in name:
                assert_same(state[name], saved[name])
    assert_same(state["average/blocks/1/moe/gate/kernel"], state["params/blocks/1/moe/gate/kernel"])
    for moment in ("mu", "nu"):
        assert not np.asarray(state[f"optimizer/direction/{moment}/blocks/1/moe/gate/kernel"]).any()
    for counter in ("step", "optimizer/direction/count", "optimizer/learning_rate/count"):
        assert int(state[counter]) == STEP


def test_without_the_optimizer_the_moving_average_is_what_begins(dense, tmp_path):
    folder, saved = dense
    upcycle_folder(folder, tmp_path / "sparse", MOE)
    state = started(tmp_path / "sparse")
    assert_same(state["params/head/kernel"], saved["average/head/kernel"])
    assert_same(state["params/blocks/1/moe/experts/w_in"][2], saved["average/blocks/1/mlp/w_in"])
    with pytest.raises(UserError, match="has no optimizer state: set initialize.optimizer=false"):
        started(tmp_path / "sparse", optimizer=True)


@pytest.mark.slow  # for the compiler
def test_a_run_goes_on_from_there(dense, tmp_path):
    upcycle_folder(dense[0], tmp_path / "sparse", MOE, optimizer=True)
    initialize = Initialize(path=str(tmp_path / "sparse"), fresh=(), optimizer=True)
    assert loop.train(tiny_config(steps=STEP + 1, initialize=initialize), tmp_path / "run").step == STEP + 1


def test_the_summary_counts_both_models(dense, tmp_path):
    summary = upcycle_folder(dense[0], tmp_path / "sparse", MOE, optimizer=True, sets=["model.moe.router.k=2"])
    # The MLP has 8 * 12 + 12 + 12 * 8 + 8 = 212 parameters; two more of it, and 8 * 3 of the gate.
    assert summary.parameters - summary.dense_parameters == 2 * 212 + 24
    assert summary.model.moe == dataclasses.replace(MOE, router=TopK(k=2, renormalize=True))
    lines = str(summary).splitlines()
    assert lines[0] == "dense            1,354 parameters, of step 7"
    assert lines[1] == "sparse           1,802 parameters; 3 experts in blocks 1"
    assert lines[2] == "optimizer        82 arrays"


@pytest.mark.parametrize(
    ("moe", "options", "sentence"),
    [
        (
            dataclasses.replace(MOE, layers=(5,)),
            {},
            r"^layers=\(5,\) must name blocks from 0 to 1, at least one\. \(from the upcycling of .*dense\d+\)$",
        ),
        (MOE, {"step": 3}, r"^There is no checkpoint of step 3 in .*, only of \[7\]\.$"),
        (
            MOE,
            {"sets": ["model.moe.num_expert=3"]},
            "no option 'num_expert' .* Did you mean 'num_experts'",
        ),
        (
            dataclasses.replace(MOE, images_per_group=400),
            {"optimizer": True},
            "a group of 400 images is larger",
        ),
    ],
    ids=["layers", "step", "sets", "groups"],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(dense, tmp_path, moe, options, sentence):
    with pytest.raises(UserError, match=sentence):
        upcycle_folder(dense[0], tmp_path / "sparse", moe, **options)
    assert not list(tmp_path.iterdir())


def test_a_sparse_model_is_not_made_sparse_again(dense, tmp_path):
    upcycle_folder(dense[0], tmp_path / "sparse", MOE)
    with pytest.raises(UserError, match=r"sparse is sparse already, in blocks \(1,\)\.$"):
        upcycle_folder(tmp_path / "sparse", tmp_path / "again", MOE)


def test_a_converted_model_has_no_optimizer_to_take_along(tmp_path):
    state = save(dense_config(), tmp_path / "run")
    params = {name.removeprefix("params/"): np.asarray(a) for name, a in state.items() if name.startswith("params/")}
    save_model(tmp_path / "converted", dense_config().model, params)
    with pytest.raises(UserError, match=r"converted has no optimizer state: leave --optimizer out\.$"):
        upcycle_folder(tmp_path / "converted", tmp_path / "sparse", MOE, optimizer=True)
    assert upcycle_folder(tmp_path / "converted", tmp_path / "sparse", MOE).optimizer_arrays == 0
