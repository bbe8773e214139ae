import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jmoe import MoEConfig, TopK
from jmoe.evaluate.fewshot import (
    FeatureSet,
    FewShotResult,
    best_l2,
    choose_shots,
    few_shot_accuracy,
    fit_ridge,
    make_featurizer,
)
from jmoe.models import vit
from tests.drawn import drawn

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CLASSES = 3


def problem(seed, images, width):
    """Features around a centre for each class, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    centres = rng.normal(size=(CLASSES, width))
    features = centres[labels] + rng.normal(size=(images, width))
    return FeatureSet(features=(5 + 3 * features).astype(np.float32), labels=labels)


def solved_directly(train, labels, test, l2):
    """The regression by a linear solver in float64."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-5
    x, z = (np.concatenate([(f - mean) / std, np.full((len(f), 1), 100.0)], axis=1) for f in (train, test))
    y = 2 * np.eye(CLASSES)[labels] - 1
    return z @ np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)


# The regression


@pytest.mark.parametrize("width", [4, 31], ids=["more images than features", "more features than images"])
@pytest.mark.parametrize("l2", [2.0**-6, 1.0, 2.0**12])
def test_the_scores_are_those_of_a_linear_solver(width, l2):
    train, test = problem(0, 19, width), problem(1, 7, width)
    expected = solved_directly(train.features, train.labels, test.features, l2)
    exact = fit_ridge(train.features, train.labels, CLASSES, "float64")
    assert len(exact.values) == min(19, width + 1)
    np.testing.assert_allclose(exact.scores(test.features, l2), expected, rtol=1e-5, atol=1e-6)
    published = fit_ridge(train.features, train.labels, CLASSES)
    assert published.scores(test.features, l2).dtype == np.float32
    # One eigenvalue is 190,000, which float32 knows to about 0.02: so much the smaller l2 may be off.
    np.testing.assert_allclose(published.scores(test.features, l2), expected, atol=1e-3 if l2 >= 1 else 0.1)


def test_a_feature_that_never_changes_does_no_harm():
    train = problem(0, 19, 4)
    features = np.concatenate([train.features, np.full((19, 1), 7, np.float32)], axis=1)
    with_it, without = (fit_ridge(f, train.labels, CLASSES, "float64") for f in (features, train.features))
    assert with_it.std[-1] == 1e-5
    np.testing.assert_allclose(with_it.scores(features, 1.0), without.scores(train.features, 1.0), rtol=1e-6)


# The choice of images


@given(seed=st.integers(0, 99), shots=st.integers(1, 5))
def test_every_class_gives_as_many_images_and_fewer_shots_are_among_more(seed, shots):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(CLASSES), [5, 6, 9]))
    chosen = choose_shots(labels, CLASSES, shots, seed)
    assert len(set(chosen.tolist())) == CLASSES * shots
    np.testing.assert_array_equal(labels[chosen], np.repeat(np.arange(CLASSES), shots))
    more = choose_shots(labels, CLASSES, 5, seed)
    np.testing.assert_array_equal(chosen.reshape(CLASSES, -1), more.reshape(CLASSES, -1)[:, :shots])


def test_other_seeds_choose_other_images():
    labels = np.arange(120) % CLASSES
    assert len({tuple(choose_shots(labels, CLASSES, 5, seed)) for seed in range(9)}) == 9


def test_a_class_with_fewer_images_than_shots_is_named():
    with pytest.raises(
        ValueError, match="4 shots need 4 training images of every class, and class 1 has 3: evaluate wi"
    ):
        choose_shots(np.repeat(np.arange(CLASSES), [5, 3, 9]), CLASSES, 4)
    assert len(choose_shots(np.repeat(np.arange(CLASSES), [3, 2, 9]), CLASSES, 4, allow_fewer=True)) == 3 + 2 + 4
    with pytest.raises(ValueError, match="class 2 has 0: "):
        choose_shots(np.array([0, 1, 0, 1]), CLASSES, 1)


# Accuracy, and the l2


def test_accuracy_counts_the_test_images_whose_class_scores_highest():
    train, test = problem(0, 40, 5), problem(0, 23, 5)
    accuracy = few_shot_accuracy(train, test, CLASSES, shots=(2, 7), l2=(1.0, 64.0, 2.0**16), seed=3)
    assert accuracy.shape == (2, 3)
    for i, shots in enumerate((2, 7)):
        chosen = choose_shots(train.labels, CLASSES, shots, 3)
        for j, l2 in enumerate((1.0, 64.0, 2.0**16)):
            scores = solved_directly(train.features[chosen], train.labels[chosen], test.features, l2)
            assert accuracy[i, j] == pytest.approx((scores.argmax(axis=1) == test.labels).mean())


def test_the_best_l2_has_the_highest_mean_rank():
    # Shots: 1. Ranks of the l2 in the first dataset: 0 2 1; in the second: 1 2 0; in the third: 2 0 1.
    accuracy = np.array([[[0.1, 0.9, 0.8]], [[0.3, 0.4, 0.2]], [[0.9, 0.1, 0.2]]], np.float32)
    assert best_l2(accuracy).tolist() == [1]  # 3, 4 and 2 together; the mean accuracies are 0.43, 0.47, 0.40
    # The mean accuracy of the first is the highest, by one dataset; its rank is not.
    assert best_l2(np.array([[[1, 0.1]], [[0.4, 0.5]], [[0.4, 0.5]]], np.float32)).tolist() == [1]


def test_of_equally_good_l2_the_first_is_taken_but_in_one_dataset_the_later_ranks_higher():
    assert best_l2(np.array([[[0.1, 0.2]], [[0.2, 0.1]]], np.float32)).tolist() == [0]
    assert best_l2(np.array([[[0.5, 0.5, 0.4]]], np.float32)).tolist() == [1]


@pytest.mark.parametrize("sort", ["stable", "quicksort"])
def test_the_recorded_choice_of_l2(sort):
    with np.load(GOLDENS / "fewshot_best_l2.npz") as file:
        np.testing.assert_array_equal(file["l2_regs"][best_l2(file["accuracy"], sort=sort)], file["best_l2"])


@pytest.mark.parametrize("name", ["fewshot_n_ge_d", "fewshot_d_gt_n"])
def test_the_recorded_accuracies_in_float32_and_float64(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays, config = dict(file), json.loads(str(file["config"]))
    train, test = (
        FeatureSet(features=arrays[f"{s}_features"], labels=arrays[f"{s}_labels"]) for s in ("train", "test")
    )
    l2 = arrays["l2_regs"].tolist()
    for dtype in ("float32", "float64"):
        accuracy = few_shot_accuracy(
            train,
            test,
            config["num_classes"],
            shots=arrays["shots"].tolist(),
            l2=l2,
            seed=config["permute_seed"],
            dtype=dtype,
        )
        wrong = np.round(np.abs(accuracy - arrays["accuracy"]) * len(test.labels), 3)
        assert (wrong <= np.where(np.array(l2) < 1, 1, 0)).all()  # one image, where float32 has no digits left


def test_a_result_is_a_table_plain_data_and_metrics():
    accuracy = {
        "a": np.array([[0.1, 0.5], [0.7, 0.8]], np.float32),
        "long name": np.array([[0.25, 0.75], [1, 0.9]], np.float32),
    }
    result = FewShotResult.at_best_l2(accuracy, (1, 10), (0.125, 2.0**19), {"a": 7, "long name": 360})
    assert result.l2 == {1: 2.0**19, 10: 0.125}  # with 10 shots both have a mean rank of 0.5
    assert str(result).splitlines() == [
        "few-shot         1-shot     10-shot",
        "a               50.00 %     70.00 %  of 7 images",
        "long name       75.00 %    100.00 %  of 360 images",
        "l2               524288       0.125  chosen on the test images",
    ]
    assert json.loads(json.dumps(result.to_json()))["accuracy"]["a"]["1"] == 0.5
    assert result.metrics() == pytest.approx(
        {
            "fewshot/a/1": 0.5,
            "fewshot/a/10": 0.7,
            "fewshot/long name/1": 0.75,
            "fewshot/long name/10": 1.0,
            "fewshot/l2/1": 2.0**19,
            "fewshot/l2/10": 0.125,
        }
    )


# Features


def network(**moe):
    """A model and its features as one function; parameters are random, so that the members of an ensemble differ."""
    config = vit.ViTConfig(
        patch_size=4,
        width=8,
        depth=1,
        hidden_dim=12,
        num_heads=2,
        num_classes=3,
        image_size=(8, 8),
        channels=1,
        representation_dim=5,
        moe=MoEConfig(num_experts=4, layers=(0,), router=TopK(k=2, capacity_factor=None), images_per_group=2, **moe),
    )
    graph, state = nnx.split(drawn(functools.partial(vit.VisionTransformer, config), scale=1 / 3))
    features = jax.jit(lambda images: nnx.merge(graph, state)(images.astype(jnp.float32) / 127.5 - 1).features)
    return graph, state, features


def test_features_are_those_before_the_head_of_every_image_that_is_not_masked():
    graph, state, features = network()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 8, 8, 1), np.uint8), rng.integers(0, 3, 6)
    mask = np.array([True, True, True, True, False, True, False, True])
    rows = np.array([0, 1, 2, 3, 0, 4, 0, 5])
    batches = [
        {"image": images[rows[i : i + 4]], "label": labels[rows[i : i + 4]], "mask": mask[i : i + 4]} for i in (0, 4)
    ]
    found = make_featurizer(graph)(batches, state)
    assert found.features.shape == (6, 5)
    np.testing.assert_allclose(found.features, features(images), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.labels, labels)


def test_the_members_of_an_ensemble_are_averaged():
    graph, state, features = network(members=2)
    image = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    batch = {"image": image.astype(np.float32), "label": np.zeros(4, np.int32), "mask": np.ones(4, bool)}
    rows = np.asarray(features(image))  # image 0 twice, image 1 twice, ...
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    found = make_featurizer(graph, members=2)([batch], state).features
    np.testing.assert_allclose(found, (rows[::2] + rows[1::2]) / 2, rtol=1e-5, atol=1e-6)


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="There is no image to take features of"):
        make_featurizer(nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[0])([])
