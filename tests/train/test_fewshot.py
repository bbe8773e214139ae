import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jmoe.data import CentralCrop, Digits, InMemory, Resize
from jmoe.errors import InterruptedRunError, UserError
from jmoe.evaluate.fewshot import FeatureSet, FewShotResult, few_shot_accuracy
from jmoe.train.config import EvalConfig, FewShot
from jmoe.train.fewshot import few_shot_evaluator_of
from jmoe.train.loop import train
from jmoe.train.overrides import apply_overrides
from jmoe.train.state import initial_state, make_model
from tests.train.tiny import tiny_config


@dataclasses.dataclass(frozen=True)
class Stripes:
    """Gray images of 11 x 9 pixels in two classes, dark and bright; `few` of them to train on."""

    few: int = 10
    name: str = "stripes"
    train: str = "train"
    test: str = "test"
    num_classes: int = 2

    def open(self, split):
        count = self.few if split == "train" else 7
        labels = np.arange(count, dtype=np.int32) % 2
        noise = np.random.default_rng(count).integers(0, 9, (count, 11, 9, 1))
        return InMemory(f"stripes ({split})", "", (noise + 200 * labels[:, None, None, None]).astype(np.uint8), labels)


def config_with(**options):
    """Dense, because a model without experts is compiled in no time."""
    config = tiny_config(evaluate=EvalConfig(every=4, batch_size=96, fewshot=FewShot(**options)), steps=4)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=None, depth=1))


def state_of(config):
    return initial_state(config, optax.identity())


def test_the_digits_of_both_splits_are_seen_once_in_order_and_without_augmentation():
    config = config_with(shots=(1, 9), l2=(0.5, 1.0, 1024.0), seed=5)
    result = few_shot_evaluator_of(config)(state_of(config))
    graph, state = nnx.split(make_model(config))
    features = jax.jit(lambda x: nnx.merge(graph, state)(x).features)
    records = [Digits().open(split) for split in ("train", "test")]
    train_set, test_set = (
        FeatureSet(features=np.asarray(features(r.images.astype(np.float32) / 127.5 - 1)), labels=r.labels)
        for r in records
    )
    accuracy = few_shot_accuracy(train_set, test_set, 10, shots=(1, 9), l2=(0.5, 1.0, 1024.0), seed=5)
    expected = FewShotResult.at_best_l2({"digits": accuracy}, (1, 9), (0.5, 1.0, 1024.0), {"digits": 360})
    assert result.images == {"digits": 360}
    assert result.accuracy["digits"] == pytest.approx(expected.accuracy["digits"], abs=1.5 / 360)
    assert result.accuracy["digits"][9] > 0.3  # also without training: 8 features, 10 classes


def test_other_datasets_are_preprocessed_and_share_one_l2():
    preprocess = (Resize((10, 9)), CentralCrop(8))
    both = config_with(shots=(2,), datasets=(Stripes(), Stripes(name="again", few=5)), preprocess=preprocess)
    result = few_shot_evaluator_of(both)(state_of(both))
    assert result.accuracy == {"stripes": {2: 1.0}, "again": {2: 1.0}}
    assert result.images == {"stripes": 7, "again": 7}
    assert list(result.l2) == [2]


def test_what_cannot_be_evaluated_is_said_in_a_sentence():
    config = config_with(shots=(1, 3), datasets=(Stripes(few=4),), preprocess=(Resize(8),))
    with pytest.raises(
        UserError, match="stripes: 3 shots need 3 training images of every class, and class 0 has 2: eval"
    ):
        few_shot_evaluator_of(config)(state_of(config))
    config = config_with(datasets=(Stripes(),), preprocess=(Resize(7),))
    with pytest.raises(
        UserError, match=r"stripes has images of \(7, 7, 1\) .* takes \(8, 8, 1\). Set data.test_preproc"
    ):
        few_shot_evaluator_of(config)(state_of(config))
    with pytest.raises(UserError, match="FewShot has two datasets named 'stripes': evaluate on each of them by itself"):
        few_shot_evaluator_of(config_with(datasets=(Stripes(), Stripes(few=5))))


def test_it_can_be_ended_before_every_batch_and_every_regression():
    config = config_with(shots=(1, 2), l2=(1.0, 8.0), datasets=(Stripes(),), preprocess=(Resize(8),))
    evaluator, state, calls = few_shot_evaluator_of(config), state_of(config), []
    evaluator(state, lambda: calls.append(1))
    assert len(calls) == 1 + 1 + 2 * 2  # a batch of each split, then shots and regularisations

    def ends():
        calls.pop()
        if not calls:
            raise InterruptedRunError("Stopped.", 15)

    with pytest.raises(InterruptedRunError, match=r"^Stopped\.$"):
        evaluator(state, ends)


@pytest.mark.parametrize("shots", [(), (0, 1)])
def test_options_that_make_no_sense_are_refused(shots):
    with pytest.raises(ValueError, match="FewShot wants shots of at least 1 image of each class; it got"):
        FewShot(shots=shots)
    with pytest.raises(ValueError, match="FewShot wants l2 above 0; it got"):
        FewShot(l2=(1.0, 0.0))


def test_a_run_that_asks_for_it_logs_it_at_every_evaluation(tmp_path):
    config = config_with(shots=(1, 2), l2=(1.0, 8.0))
    summary = train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (tested,) = [line for line in lines if "test/accuracy" in line]
    assert tested["test/accuracy"] == summary.evaluation.accuracy
    assert 0 < tested["fewshot/digits/1"] < tested["fewshot/digits/2"]
    assert {tested["fewshot/l2/1"], tested["fewshot/l2/2"]} <= {1.0, 8.0}
    asked = apply_overrides(tiny_config(), ["evaluate.fewshot=FewShot(shots=(1, 2), l2=(1, 8))"])
    assert asked.evaluate.fewshot == config.evaluate.fewshot
