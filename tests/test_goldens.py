"""Every number that was recorded from the reference implementation (tests/goldens/README.md), replayed by jmoe.

A replay sees the inputs of a case only (tests/goldens/case.py). Integers and booleans are equal; floats are as near as
another order of operations in float32 allows, by the tolerances that were stated with the recordings or tighter ones.
"""

import collections
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from tests.goldens.__main__ import main
from tests.goldens.case import INPUTS, is_input, load, names, results

FOLDER = pathlib.Path(__file__).parent / "goldens"
CASES = names(FOLDER)
COUNTS = {
    "checkpoint": 4,
    "dispatch": 6,
    "ensemble": 3,
    "fewshot": 3,
    "init": 4,
    "layer": 6,
    "loss": 1,
    "mixup": 2,
    "optim": 7,
    "ot": 10,
    "pp": 4,
    "routing_expert_choice": 5,
    "routing_topk": 34,
    "softmoe": 4,
    "train": 1,
    "vit": 8,
}


def test_all_recordings_are_here():
    assert collections.Counter(load(FOLDER, name).family for name in CASES) == COUNTS
    assert COUNTS.keys() == INPUTS.keys()


def tolerance(case, array: str, value: np.ndarray) -> tuple[float, float]:
    """rtol and atol, for gradients relative to their largest entry; (0, 0) for what must be equal."""
    gradient = array.startswith("grads")
    match case.family:
        case "checkpoint":
            return 0, 0
        case "dispatch" if gradient and case.config["bfloat16"]:
            return 1e-2, 1e-2
        case "fewshot" if array == "accuracy" and "best_l2" not in case.name:
            return 0, 1.01 / len(case.arrays["test_labels"])  # one image where l2 is small; see below
        case "init":
            return 1e-5, 1e-6
        case "optim" if "/values" in array:
            return 2e-5, 1e-9
        case "optim":
            half = case.config["optimizer"].get("mu_dtype") == "bfloat16"
            return 2e-5, 2e-4 if half else 5e-6
        case "ot" if value.dtype.kind == "f" and "lbfgs" in case.name:
            return 5e-3, 5e-4  # the optimum, and how near the reference came to it
        case "pp" if value.dtype == np.uint8 and "out" in array:
            return 0, 1  # at exact integers, which a last bit decides
        case "pp":
            return (0, 2e-5) if np.abs(value).max(initial=0) <= 1 else (0, 2e-3)
        case "train" if array.endswith("key/bias"):
            # Its gradient is zero up to rounding, which Adam divides by its own size: a step of any sign each time.
            return 0, 2 * case.config["steps"] * case.config["optimizer"]["learning_rate"]["peak_value"]
        case "train":
            return (2e-5, 5e-4) if array.startswith("params_after") else (1e-4, 2e-5)
        case "vit" if value.dtype.kind == "f":
            return (1e-3, 1e-4) if gradient else (1e-4, 2e-5)
    if value.dtype.kind in "iub":
        return 0, 0
    if gradient:
        return 1e-4, 1e-5
    return (2e-4, 2e-6) if "loss" in array else (1e-5, 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_recorded(name):
    case, expected = dataclasses.replace(load(FOLDER, name), diagnostics=False), results(FOLDER, name)
    expected.pop("jit_vs_eager_max_abs_diff_logits", None)  # how far two ways to compile were apart
    found = case.replay()
    assert expected.keys() <= found.keys(), "a result is missing"
    for array, value in expected.items():
        assert (found[array].shape, found[array].dtype) == (value.shape, value.dtype), array
        if array in NOT_REPRODUCIBLE.get(name, ()):
            continue
        rtol, atol = tolerance(case, array, value)
        if array.startswith("grads"):
            # A key's bias changes all scores of a query alike: its gradient is zero up to rounding.
            atol *= largest_gradient(expected) if array.endswith("key/bias") else np.abs(value).max()
        actual, wanted = found[array].astype(np.float64), value.astype(np.float64)
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol, err_msg=array)


def largest_gradient(expected: dict[str, np.ndarray]) -> float:
    return max(np.abs(value).max() for name, value in expected.items() if name.startswith("grads"))


@pytest.mark.parametrize("name", ["fewshot_d_gt_n", "fewshot_n_ge_d"])
def test_few_shot_accuracy_is_equal_unless_l2_is_small(name):
    case, expected = load(FOLDER, name), results(FOLDER, name)["accuracy"]
    large = case.arrays["l2_regs"] >= 1
    assert large.sum() >= 3
    np.testing.assert_allclose(case.replay()["accuracy"][:, large], expected[:, large], rtol=1e-6)


# The class token that vit_zoom draws at random where only the shape of the target is known.
NOT_REPRODUCIBLE = {"init_vit_zoom": ("c6/output",)}


def only_inputs(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
    """Copies a case without any of its results."""
    for path in source.glob(f"{name}.*"):
        if path.suffix != ".npz":
            (target / path.name).write_bytes(path.read_bytes())
    if load(source, name).family == "checkpoint":
        return  # its .npz holds nothing but results
    with np.load(source / f"{name}.npz", allow_pickle=False) as file:
        family = json.loads(str(file["config"]))["family"]
        arrays = {key: file[key] for key in file.files if key == "config" or is_input(family, name, key)}
    np.savez(target / f"{name}.npz", **arrays)


def test_the_command_needs_nothing_but_inputs(tmp_path, capsys):
    topk = ("routing_topk_ties_k2_bpr1", "routing_topk_capacity_table")
    chosen = ("layer_topk_k1_bf16", "checkpoint_misc_dtypes", *topk)
    (tmp_path / "cases").mkdir()
    for name in chosen:
        only_inputs(FOLDER, tmp_path / "cases", name)
    assert main([str(tmp_path / "cases"), "--out", str(tmp_path / "out")]) == 0
    assert "4 of 4 cases replayed" in capsys.readouterr().out
    for name in chosen:
        with np.load(tmp_path / "out" / f"{name}.npz", allow_pickle=False) as found:
            assert results(FOLDER, name).keys() <= set(found.files)
    with np.load(tmp_path / "out" / "layer_topk_k1_bf16.npz", allow_pickle=False) as found:
        np.testing.assert_allclose(found["outputs"], results(FOLDER, "layer_topk_k1_bf16")["outputs"], atol=1e-5)


@pytest.fixture
def compiled_quickly():
    """Without optimizations of the compiler, which take longer than what they save here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
def test_the_command_replays_everything(tmp_path):
    assert main([str(FOLDER), "--out", str(tmp_path)]) == 0
    for name in CASES:
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as found:
            assert results(FOLDER, name).keys() <= set(found.files)


def test_a_case_that_cannot_be_replayed_is_named_and_the_others_are_replayed(tmp_path, capsys):
    only_inputs(FOLDER, tmp_path, "routing_topk_capacity_table")
    np.savez(tmp_path / "strange.npz", config=json.dumps({"family": "telepathy"}))
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 cases replayed" in printed.out
    assert "strange: cannot be replayed: ValueError: the family 'telepathy' is not known" in printed.err
    assert "not replayed: strange" in printed.err


def test_a_folder_without_cases_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "there are no cases in" in capsys.readouterr().err
