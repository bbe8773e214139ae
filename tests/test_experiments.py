"""What the experiment files claim."""

import ast
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from jmoe.analysis.cost import forward_cost
from jmoe.errors import UserError
from jmoe.models.vit import VisionTransformer
from jmoe.train.config import total_steps
from jmoe.train.config_json import from_json, to_json
from jmoe.train.experiment import load_experiment
from jmoe.train.loop import train

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.py") if "def get_config" in path.read_text())


def experiment(name, *overrides):
    return load_experiment(FOLDER / f"{name}.py", overrides)


def test_all_experiments_are_looked_at():
    assert EXPERIMENTS == [
        "cifar10_vmoe",
        "digits_batch_priority",
        "digits_dense",
        "digits_ensemble",
        "digits_expert_choice",
        "digits_finetuned",
        "digits_soft",
        "digits_switch",
        "digits_transport",
        "digits_upcycled",
        "digits_vmoe",
        "vmoe_15b_imagenet21k",
        "vmoe_b16_imagenet21k",
        "vmoe_h14_imagenet21k",
        "vmoe_l16_imagenet21k",
        "vmoe_s32_imagenet1k",
    ]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_can_be_read_and_saved(name):
    config = experiment(name)
    assert from_json(to_json(config)) == config
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"jmoe train experiments/{name}.py --workdir" in text
    assert name in (FOLDER / "README.md").read_text()


# Millions of parameters as published (google-research/vmoe for the first two, the paper for the others), with as many
# classes; and the dataset that the experiment trains on.
PUBLISHED = {
    "vmoe_s32_imagenet1k": ("57.00", 1000, "imagenet2012"),
    "vmoe_b16_imagenet21k": ("300.97", 21_843, "imagenet21k"),
    "vmoe_l16_imagenet21k": ("3446.0", 18_291, "imagenet21k"),
    "vmoe_h14_imagenet21k": ("2688.6", 18_291, "imagenet21k"),
    "vmoe_15b_imagenet21k": ("14705.1", 29_593, "imagenet21k"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters(name):
    millions, classes, _ = PUBLISHED[name]
    config = experiment(name, f"model.num_classes={classes}")
    decimals = len(millions.partition(".")[2])
    assert f"{forward_cost(config.model).parameters / 1e6:.{decimals}f}" == millions


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_a_published_model_says_which_dataset_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("JMOE_DATA_DIR", str(tmp_path / "datasets"))
    dataset = PUBLISHED[name][2]
    with pytest.raises(UserError, match=f"^The dataset '{dataset}' is not prepared in {tmp_path}/datasets"):
        train(experiment(name), tmp_path / "run")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_fits_its_steps(name):
    config = experiment(name)
    rate = config.optimizer.learning_rate(total_steps(config))
    assert float(rate(10_000)) == pytest.approx(config.optimizer.peak_lr)
    assert float(rate(config.steps)) <= 1e-5


def flops(config):
    """Of one forward pass of a batch, as XLA counts the compiled program."""
    model = nnx.eval_shape(lambda: VisionTransformer(config.model, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((config.data.batch_size, *config.model.image_size, config.model.channels), np.float32)
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x).logits).lower(state, images).compile()
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("name", ["digits_vmoe", "digits_expert_choice"])
def test_the_dense_twin_costs_the_same(name):
    ratio = flops(experiment(name)) / flops(experiment("digits_dense"))
    assert 0.98 < ratio < 1.05


@pytest.fixture
def digits_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("JMOE_DATA_DIR", str(tmp_path / "datasets"))


@pytest.mark.slow
@pytest.mark.usefixtures("digits_prepared")
def test_a_small_vmoe_reads_digits(tmp_path):
    # One seed, as it takes a minute or two; experiments/seeds.py trains three.
    assert train(experiment("digits_vmoe"), tmp_path).evaluation.accuracy >= 0.975


@pytest.mark.slow
@pytest.mark.usefixtures("digits_prepared")
def test_batch_priority_keeps_what_matters_when_capacity_is_short(tmp_path):
    curve = curve_of_capacity().curve
    curves = [curve(tmp_path / str(seed), "true", seed) for seed in range(3)]  # one is too few for such a difference
    priority, vanilla = (
        dict(zip((2.0, 1.0, 0.5, 0.25, 0.15), np.mean([c[order] for c in curves], axis=0), strict=True))
        for order in ("batch priority", "vanilla")
    )
    assert priority[0.25] - vanilla[0.25] >= 0.03
    assert priority[0.15] - vanilla[0.15] >= 0.04


def curve_of_capacity():
    """The script that makes the table of experiments/README.md, as a module."""
    spec = importlib.util.spec_from_file_location("capacity_curve", FOLDER / "capacity_curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
