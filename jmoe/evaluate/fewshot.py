"""Few-shot linear evaluation with the published protocol (of V-MoE, arXiv:2106.05974).

How good are the features of a frozen model? A ridge regression to the classes is fitted on a few images of each, and
its hits on the test images are counted. All that follows the features is NumPy on the host: the problems are small,
and no accelerator needs memory for them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.evaluate.accuracy import scale_pixels
from jmoe.evaluate.devices import HERE, Devices
from jmoe.nn.ensemble import mean_of_members
from jmoe.notation import Array, Bool, Float, Int, UInt8

L2 = tuple(2.0**i for i in range(-10, 20))  # the published regularisations
SEED = 397586535  # of the published choice of images: what their code makes of its seed 0
BIAS = 100.0  # the constant feature; so large that the regularisation hardly counts for its weight
STD_OFFSET = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """What a model made of the images of a split.

    Attributes:
      features: of each image.
      labels: their classes.
    """

    features: Float[np.ndarray, "N D"]
    labels: Int[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge:
    """Ridge regressions of one problem for every l2, from one eigendecomposition: W = left (values + l2)^-1 right.

    With X the standardised features [N, D], of which the last is constant, and Y the targets, 1 for an image's class
    and -1 for the others, W = (X^T X + l2)^-1 X^T Y = X^T (X X^T + l2)^-1 Y. The smaller of the two matrices is
    decomposed as Q values Q^T. There is no intercept beside the constant feature, whose weight is regularised too.

    Attributes:
      mean: of the features it was fitted on.
      std: their population standard deviation, plus 1e-5.
      left: Q, or X^T Q.
      values: the eigenvalues.
      right: Q^T X^T Y, or Q^T Y.
    """

    mean: Float[np.ndarray, " features"]
    std: Float[np.ndarray, " features"]
    left: Float[np.ndarray, "D R"]
    values: Float[np.ndarray, " R"]
    right: Float[np.ndarray, "R classes"]

    def inputs(self, features: Float[np.ndarray, "N features"]) -> Float[np.ndarray, "N D"]:
        """X: standardised as the features it was fitted on, with the constant feature."""
        return _with_bias((features.astype(self.mean.dtype) - self.mean) / self.std)

    def weights(self, l2: float) -> Float[np.ndarray, "D classes"]:
        """W."""
        return (self.left / (self.values + self.values.dtype.type(l2))) @ self.right

    def scores(self, features: Float[np.ndarray, "N features"], l2: float) -> Float[np.ndarray, "N classes"]:
        """X W, whose largest entry of a row is the prediction."""
        return self.inputs(features) @ self.weights(l2)


def fit_ridge(
    features: Float[np.ndarray, "N features"],
    labels: Int[np.ndarray, " N"],
    num_classes: int,
    dtype: Literal["float32", "float64"] = "float32",
) -> Ridge:
    """Decomposes the regression from features to classes; see `Ridge`.

    Args:
      features: what to fit on.
      labels: their classes.
      num_classes: of the dataset.
      dtype: of the arithmetic; float32 as published. The constant feature makes one eigenvalue about 10^4 N, beside
        which float32 has no digits left for an l2 below about N / 1000: there the result is partly rounding. float64
        is the better behaviour.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64).astype(dtype) + np.dtype(dtype).type(STD_OFFSET)
    x = _with_bias((features.astype(dtype) - mean.astype(dtype)) / std)
    y = np.where(labels[:, None] == np.arange(num_classes), 1, -1).astype(dtype)
    N, D = x.shape
    if N >= D:
        values, q = np.linalg.eigh(x.T @ x)
        left, right = q, q.T @ (x.T @ y)
    else:
        values, q = np.linalg.eigh(x @ x.T)
        left, right = x.T @ q, q.T @ y
    return Ridge(mean=mean.astype(dtype), std=std, left=left, values=values, right=right)


def choose_shots(
    labels: Int[np.ndarray, " N"], num_classes: int, shots: int, seed: int = SEED, *, allow_fewer: bool = False
) -> Int[np.ndarray, " chosen"]:
    """Indices of `shots` images of each class: the first of a permutation of all of that class, class after class.

    So the images of fewer shots are among those of more. One generator permutes the classes in order.

    Args:
      labels: of all training images.
      num_classes: of the dataset.
      shots: images of each class.
      seed: of the permutations.
      allow_fewer: whether a class that has fewer images gives those, as the published code does without a word; some
        classes of cars196, for one, have 24 for its 25 shots.

    Raises:
      ValueError: a class has fewer images, and that is not allowed.
    """
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(num_classes)]
    fewest, c = min((len(indices), c) for c, indices in enumerate(chosen))
    if fewest < shots and not allow_fewer:
        raise ValueError(
            f"{shots} shots need {shots} training images of every class, and class {c} has {fewest}: evaluate with "
            "fewer shots, on more images, or with allow_fewer=True, which takes what there is."
        )
    return np.concatenate(chosen)


def few_shot_accuracy(
    train: FeatureSet,
    test: FeatureSet,
    num_classes: int,
    *,
    shots: Sequence[int],
    l2: Sequence[float] = L2,
    seed: int = SEED,
    allow_fewer: bool = False,
    dtype: Literal["float32", "float64"] = "float32",
    before_fit: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "shots l2"]:
    """Share of test images that are classified right, for every number of shots and every l2.

    Args:
      train: the images to choose the shots from.
      test: the images to classify.
      num_classes: of the dataset.
      shots: images of each class to fit on.
      l2: regularisations, above 0.
      seed: of the choice of images.
      allow_fewer: whether a class may have fewer training images than shots, see `choose_shots`.
      dtype: of the arithmetic, see `fit_ridge`.
      before_fit: is called before every one, and ends them by raising what it likes.

    Raises:
      ValueError: a class has fewer training images than shots, and that is not allowed.
    """
    accuracy = np.zeros((len(shots), len(l2)), np.float32)
    for i, count in enumerate(shots):
        chosen = choose_shots(train.labels, num_classes, count, seed, allow_fewer=allow_fewer)
        ridge = fit_ridge(train.features[chosen], train.labels[chosen], num_classes, dtype)
        inputs = ridge.inputs(test.features)
        for j, regularisation in enumerate(l2):
            before_fit()
            accuracy[i, j] = np.mean((inputs @ ridge.weights(regularisation)).argmax(axis=1) == test.labels)
    return accuracy


def best_l2(
    accuracy: Float[np.ndarray, "datasets shots l2"], *, sort: Literal["stable", "quicksort"] = "stable"
) -> Int[np.ndarray, " shots"]:
    """The l2, by its index, that does best over all datasets; one for each number of shots.

    Inside a dataset the l2 are ranked by accuracy, and the one of the highest mean rank wins, the first if several do.
    Note that these are the accuracies on the test images: the protocol has no validation images, and limits how much it
    overfits by choosing one l2 for all datasets.

    Args:
      accuracy: from `few_shot_accuracy`.
      sort: of `numpy.argsort`. "stable" gives the later of equal accuracies the higher rank. The published code takes
        "quicksort", which leaves the order of equal accuracies to the processor and to NumPy's version.
    """
    ranks = accuracy.argsort(axis=-1, kind=sort).argsort(axis=-1, kind=sort)
    return ranks.mean(axis=0).argmax(axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotResult:
    """What few-shot evaluation found.

    Attributes:
      accuracy: share, from 0 to 1, of test images classified right, for each dataset and number of shots.
      l2: the regularisation chosen for each number of shots, on the test images of all datasets (see `best_l2`).
      images: how many test images each dataset has.
    """

    accuracy: dict[str, dict[int, float]]
    l2: dict[int, float]
    images: dict[str, int]

    @classmethod
    def at_best_l2(
        cls,
        accuracy: Mapping[str, Float[np.ndarray, "shots l2"]],
        shots: Sequence[int],
        l2: Sequence[float],
        images: dict[str, int],
    ) -> "FewShotResult":
        """Of the accuracies of each dataset, takes those at the l2 that does best over all (see `best_l2`)."""
        best = best_l2(np.stack(list(accuracy.values())))
        return cls(
            accuracy={name: {k: float(row[i, best[i]]) for i, k in enumerate(shots)} for name, row in accuracy.items()},
            l2={k: float(l2[best[i]]) for i, k in enumerate(shots)},
            images=images,
        )

    def __str__(self) -> str:
        """A table, as the command line prints it."""
        width = max(len("few-shot"), *map(len, self.accuracy)) + 2
        lines = ["few-shot".ljust(width) + "".join(f"{f'{shots}-shot':>12}" for shots in self.l2)]
        for name, of_shots in self.accuracy.items():
            accuracies = "".join(f"{f'{100 * accuracy:.2f} %':>12}" for accuracy in of_shots.values())
            lines.append(f"{name.ljust(width)}{accuracies}  of {self.images[name]} images")
        chosen = "".join(f"{f'{l2:.6g}':>12}" for l2 in self.l2.values())
        return "\n".join([*lines, f"{'l2'.ljust(width)}{chosen}  chosen on the test images"])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def metrics(self) -> dict[str, float]:
        """By name, for the log of a run."""
        accuracy = {f"fewshot/{name}/{k}": value for name, row in self.accuracy.items() for k, value in row.items()}
        return accuracy | {f"fewshot/l2/{k}": value for k, value in self.l2.items()}


def make_featurizer(graph: nnx.GraphDef, members: int = 1, devices: Devices = HERE) -> Callable[..., FeatureSet]:
    """Returns (batches, *states) -> FeatureSet for the model of a graph.

    The features are what the head reads; those of the members of an ensemble are averaged. As in evaluation, images
    that only fill up a batch are masked and left out.

    Args:
      graph: of a VisionTransformer; merged with the states it is the model.
      members: M of an ensemble.
      devices: where it runs.

    Returns:
      a function of batches, each with "image" [B, Y, X, channels], "label" [B] and "mask" [B]; it raises ValueError if
      there is no image.
    """

    @functools.partial(jax.jit, out_shardings=devices.everywhere, compiler_options=devices.exchange.compiler_options)
    def features_of(
        states: Any,
        image: UInt8[Array, "B Y X channels"] | Float[Array, "B Y X channels"],
        label: Int[Array, " B"],
        mask: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B D"], Int[Array, " B"], Bool[Array, " B"]]:
        features = nnx.merge(graph, *states)(scale_pixels(image), mask=mask, exchange=devices.exchange).features
        # Labels and mask as well, because a process has only its images' own.
        return mean_of_members(features.astype(jnp.float32), members), label, mask

    def featurizer(batches: Iterable[dict[str, np.ndarray]], *states: nnx.State) -> FeatureSet:
        features, labels = [], []
        for batch in map(devices.put, batches):
            found = features_of(states, batch["image"], batch["label"], batch["mask"])
            feature, label, mask = map(np.asarray, found)
            features.append(feature[mask])
            labels.append(label[mask])
        if not sum(map(len, labels)):
            raise ValueError("There is no image to take features of.")
        return FeatureSet(features=np.concatenate(features), labels=np.concatenate(labels))

    return featurizer


def _with_bias(x: np.ndarray) -> np.ndarray:
    """Appends the constant feature."""
    return np.pad(x, ((0, 0), (0, 1)), constant_values=BIAS)
