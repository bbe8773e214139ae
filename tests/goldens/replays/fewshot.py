"""Few-shot evaluation: features and labels to accuracies, and accuracies to the l2 chosen."""

import numpy as np

from jmoe.evaluate import fewshot
from tests.goldens.case import Case


def replay(case: Case) -> dict[str, np.ndarray]:
    arrays, config = case.arrays, case.config
    l2 = arrays["l2_regs"].tolist()
    if "accuracy" in arrays:
        return {"best_l2": arrays["l2_regs"][fewshot.best_l2(arrays["accuracy"], sort="quicksort")]}
    if config["bias_constant"] != fewshot.BIAS:
        raise ValueError(f"the constant feature is {fewshot.BIAS}, not bias_constant={config['bias_constant']}")
    shots, classes, seed = arrays["shots"].tolist(), config["num_classes"], config["permute_seed"]
    train = fewshot.FeatureSet(features=arrays["train_features"], labels=arrays["train_labels"])
    test = fewshot.FeatureSet(features=arrays["test_features"], labels=arrays["test_labels"])
    accuracy = fewshot.few_shot_accuracy(train, test, classes, shots=shots, l2=l2, seed=seed, allow_fewer=True)
    found = {"accuracy": accuracy}
    scores = np.zeros((len(shots), len(l2), len(test.labels), classes))
    for i, count in enumerate(shots):
        chosen = fewshot.choose_shots(train.labels, classes, count, seed, allow_fewer=True)
        found[f"selected_train_index/shot{count}"] = chosen.astype(np.int32)
        ridge = fewshot.fit_ridge(train.features[chosen], train.labels[chosen], classes, "float64")
        for j, regularisation in enumerate(l2):
            scores[i, j] = ridge.scores(test.features, regularisation)
    second, first = np.moveaxis(np.sort(scores, axis=-1)[..., -2:], -1, 0)
    return found | {
        "float64_predictions": scores.argmax(axis=-1).astype(np.int32),
        "float64_margins": (first - second).astype(np.float32),
    }
