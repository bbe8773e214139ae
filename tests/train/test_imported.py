import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from flax import nnx

from jmoe import Switch, TopK, convert
from jmoe.convert.infer import parameter_shapes
from jmoe.convert.names import flatten
from jmoe.errors import UserError
from jmoe.models.vit import VisionTransformer
from jmoe.train import imported
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.evaluation import evaluate_checkpoint
from jmoe.train.imported import for_folder, load_model, save_model
from jmoe.train.state import initial_state, make_optimizer
from jmoe.train.workdir import prepare
from tests.train.tiny import tiny_config

TINY = tiny_config().model
MODEL = dataclasses.replace(
    TINY, dropout=0.0, position_std=0.5, moe=dataclasses.replace(TINY.moe, router=Switch(), dropout=0.0)
)


@pytest.fixture(scope="module")
def params():
    model = VisionTransformer(MODEL, rngs=nnx.Rngs(3))
    arrays = flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    arrays["head/kernel"] = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)  # it starts at zero
    return {name: np.asarray(array) for name, array in arrays.items()}


@pytest.fixture
def folder(params, tmp_path):
    save_model(tmp_path / "model", MODEL, params)
    return tmp_path / "model"


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_a_saved_model_is_loaded(folder, params):
    config, found = load_model(folder)
    assert config == MODEL
    assert same(found, params)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "model.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_it_is_evaluated_with_the_data_of_an_experiment(folder, caplog):
    experiment = tiny_config(ema_decay=0.9)  # its model has another router, and its checkpoints a moving average
    with caplog.at_level(logging.INFO, "jmoe"):
        config = for_folder(experiment, folder, [])
    assert f"The model is the converted one of {folder}/model.json; the experiment gives the data." in caplog.messages
    assert config.model == MODEL
    edited = for_folder(experiment, folder, ["model.moe.router=TopK(k=3, capacity_factor=none)", "data.batch_size=24"])
    assert edited.model == dataclasses.replace(
        MODEL, moe=dataclasses.replace(MODEL.moe, router=TopK(k=3, capacity_factor=None))
    )
    assert edited.data.batch_size == 24
    evaluation, step = evaluate_checkpoint(edited, folder)
    assert (step, evaluation.images, evaluation.dropped_tokens) == (0, 360, 0)


def test_of_a_folder_with_a_moving_average_that_is_evaluated(params, tmp_path):
    average = params | {"head/kernel": -params["head/kernel"]}
    save_model(tmp_path / "both", MODEL, params, average=average)
    save_model(tmp_path / "plain", MODEL, average)
    results = []
    for name in ("both", "plain"):
        config = for_folder(tiny_config(), tmp_path / name, [])
        results.append(evaluate_checkpoint(config, tmp_path / name)[0])
    assert results[0] == results[1]


def test_options_of_another_model_are_refused_before_anything_is_read(folder):
    with pytest.raises(UserError) as error:
        for_folder(tiny_config(), folder, ["model.moe.num_experts=8"])
    assert str(error.value) == (
        f"{folder} has 3 experts at 'blocks/1/moe/experts/b_in' (3, 12); the model has num_experts=8."
    )


def test_what_an_experiment_and_a_model_cannot_be_together_says_so(folder):
    with pytest.raises(
        UserError, match=r"a group of 4 images is larger than the batch.*\(from .*model\.json, --set data"
    ):
        for_folder(tiny_config(), folder, ["data.batch_size=2"])


def test_the_folder_of_a_run_is_evaluated_as_before(tmp_path):
    config = tiny_config()
    assert for_folder(config, tmp_path, []) == config
    assert for_folder(config, tmp_path, ["seed=4"]).seed == 4


def test_no_run_goes_on_in_the_folder_of_a_model(folder):
    with pytest.raises(UserError, match="holds a converted model, not a run. Choose another --workdir."):
        prepare(folder, tiny_config())


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_model_of_a_run_is_loaded_as_it_is_evaluated(tmp_path, ema_decay):
    config = tiny_config(ema_decay=ema_decay)
    state = initial_state(config, make_optimizer(config, 12))
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 1, state.params))
    path = prepare(tmp_path, config)
    with Checkpointer(path / "checkpoints") as checkpointer:
        checkpointer.save(5, state, {}, wait=True)
        checkpointer.save(7, jax.tree.map(lambda x: x, state), {}, wait=True)
    expected = flatten(nnx.to_pure_dict(state.params if ema_decay is None else state.average))
    for step in (None, 5):
        model, found = load_model(tmp_path, step)
        assert model == config.model
        assert same(found, {name: np.asarray(array) for name, array in expected.items()})
    with pytest.raises(UserError, match="There is no checkpoint of step 6"):
        load_model(tmp_path, 6)


def test_a_folder_is_replaced_only_if_it_holds_a_model_and_that_is_wanted(folder, params, tmp_path):
    with pytest.raises(UserError, match="model is not empty; say --overwrite, or choose another."):
        save_model(folder, MODEL, params)
    changed = params | {"head/bias": params["head/bias"] + 1}
    save_model(folder, MODEL, changed, overwrite=True)
    assert same(load_model(folder)[1], changed)
    (tmp_path / "mine").mkdir()
    save_model(tmp_path / "mine", MODEL, params)  # empty
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("")
    with pytest.raises(UserError, match="home is not empty; choose another."):
        save_model(tmp_path / "home", MODEL, params, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "mine", "model"]


def test_a_folder_that_cannot_be_written_is_as_it_was(folder, params, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        save_model(tmp_path / "file" / "x", MODEL, params)

    def full(config):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imported, "to_json", full)  # where the configuration is written, after the arrays
    with pytest.raises(UserError, match="model cannot be written: No space left on device."):
        save_model(folder, MODEL, params | {"head/bias": params["head/bias"] + 1}, overwrite=True)
    monkeypatch.undo()
    assert same(load_model(folder)[1], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_parameters_of_another_model_are_not_saved(params, tmp_path):
    with pytest.raises(UserError, match="it lacks 'norm/bias'"):
        save_model(tmp_path / "x", MODEL, {name: a for name, a in params.items() if name != "norm/bias"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["vmoe", "safetensors"])
def test_the_exact_configuration_goes_out_and_comes_in(folder, params, tmp_path, format):
    found = imported.read("jmoe", folder)
    imported.write(format, tmp_path / "out", found.config, found.params)
    again = imported.read(format, tmp_path / "out")
    assert again.config == MODEL
    assert again.assumed == {}
    assert same(again.params, params)
    inferred = convert.load(format, tmp_path / "out")  # what the arrays alone say
    assert inferred.config.moe.router == TopK(k=2)
    assert set(inferred.assumed) == {"moe.router", "moe.images_per_group", "moe.exchange_dtype"}


def test_a_model_whose_grid_is_no_square_comes_in_again(tmp_path):
    config = dataclasses.replace(MODEL, image_size=(8, 16))
    params = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    imported.write("vmoe", tmp_path / "out", config, params)
    assert imported.read("vmoe", tmp_path / "out").config == config
    with pytest.raises(UserError, match=r"out has 9 positions, which are no square grid with pool='token'\."):
        convert.load("vmoe", tmp_path / "out")  # the arrays alone do not tell


def test_a_configuration_that_is_not_known_here_is_inferred_with_a_warning(params, tmp_path, caplog):
    note = json.dumps({"$type": "elsewhere:Model"})
    convert.save("vmoe", tmp_path / "out", MODEL, params, notes={"model": note})
    found = imported.read("vmoe", tmp_path / "out")
    assert found.config.moe.router == TopK(k=2)
    assert "cannot be built here, and published options are taken: 'elsewhere:Model' is not a config" in caplog.text


def test_what_arrays_do_not_tell_can_be_set(params, tmp_path):
    convert.save("vmoe", tmp_path / "out", MODEL, params)
    found = imported.read("vmoe", tmp_path / "out", sets=["model.moe.router.k=1"])
    assert found.config.moe.router == TopK(k=1)
    assert found.assumed == {"moe.router": TopK(k=1), "moe.images_per_group": 8, "moe.exchange_dtype": None}
    others = ["model.moe.images_per_group=4", "model.moe.exchange_dtype=none"]
    found = imported.read("vmoe", tmp_path / "out", sets=["model.moe.router=Switch()", *others])
    assert found.config == dataclasses.replace(MODEL, position_std=0.02)
    assert found.assumed == {}
    with pytest.raises(
        UserError, match=r"has 3 experts at 'blocks/1/moe/experts/b_in' \(3, 12\); the model has num_exp"
    ):
        imported.read("vmoe", tmp_path / "out", sets=["model.moe.num_experts=32"])
    with pytest.raises(UserError, match="Converted has no option 'steps'.*Its options are: model."):
        imported.read("vmoe", tmp_path / "out", sets=["steps=3"])
    with pytest.raises(UserError, match="--step 3 is nothing for"):
        imported.read("vmoe", tmp_path / "out", step=3)
