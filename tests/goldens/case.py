"""A recorded case, of which a replay sees the inputs and nothing else."""

import dataclasses
import fnmatch
import importlib
import json
import pathlib

import numpy as np

# The arrays of each family that are given; every other one is a result. The recordings were made with this table.
INPUTS = {
    "routing_topk": ("inputs", "params/*", "noise_unit"),
    "routing_expert_choice": ("inputs", "params/*", "noise_unit"),
    "softmoe": ("inputs", "params/*", "noise_unit", "layer_params/*", "expert_outputs"),
    "ensemble": ("inputs", "params/*", "noise_unit", "reshape/inputs"),
    "ot": ("inputs", "params/*", "noise_unit"),
    "dispatch": ("gates", "data", "expert_outputs"),
    "layer": ("inputs", "params/*", "noise_unit"),
    "vit": ("images", "labels", "params/*", "noise_unit/*"),
    "checkpoint": (),  # the files beside it
    "init": ("source/*", "target/*", "c[0-9]*/source", "c[0-9]*/target", "zoom/source"),
    "optim": ("params/*", "grads/*"),
    "fewshot": ("train_features", "train_labels", "test_features", "test_labels", "shots", "l2_regs"),
    "pp": ("image", "p[0-9]*/encoded_bytes", "p[0-9]*/decoded", "o[0-9]*/label"),
    "loss": ("logits", "logits_ensemble", "labels_*", "valid"),
    "mixup": ("images", "labels", "dirichlet_sample"),
    "train": ("images", "labels", "params/*"),
}
# In some cases more is given, because a result cannot be had without it. By the name of the case.
MORE_INPUTS = {
    "*_ties_*": ("gates_softmax",),  # equal gates: their last bit is not reproducible
    "*_dup_*": ("gates_softmax",),
    "*_best_l2": ("accuracy",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One recorded case.

    Attributes:
      name: of its file, without the extension.
      folder: where its file is, and those of a checkpoint.
      config: its options.
      arrays: its inputs, by name.
      diagnostics: whether to compute also what is recorded of a compiler, and takes long, instead of a model.
    """

    name: str
    folder: pathlib.Path
    config: dict
    arrays: dict[str, np.ndarray]
    diagnostics: bool = True

    @property
    def family(self) -> str:
        return self.config["family"]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The inputs below prefix/, by the rest of their names."""
        return {name.removeprefix(f"{prefix}/"): a for name, a in self.arrays.items() if name.startswith(f"{prefix}/")}

    def cotangent(self, shape: tuple[int, ...]) -> np.ndarray:
        """sin(0, 1, 2, ...) in this shape, by which recorded gradients weigh outputs."""
        return np.sin(np.arange(np.prod(shape), dtype=np.float64)).astype(np.float32).reshape(shape)

    def replay(self) -> dict[str, np.ndarray]:
        """Computes every result of the case by jmoe, under the recorded names."""
        if self.family not in INPUTS:
            raise ValueError(f"the family {self.family!r} is not known; the families are {', '.join(INPUTS)}")
        return importlib.import_module(f"tests.goldens.replays.{self.family}").replay(self)


def names(folder: pathlib.Path) -> list[str]:
    """The cases in a folder; a checkpoint may lie there without an .npz of its own."""
    return sorted({path.stem for extension in ("npz", "index") for path in folder.glob(f"*.{extension}")})


def load(folder: pathlib.Path, name: str) -> Case:
    """Reads the config and the inputs of a case."""
    path = folder / f"{name}.npz"
    if not path.exists():
        return Case(name=name, folder=folder, config={"family": "checkpoint", "name": name}, arrays={})
    with np.load(path, allow_pickle=False) as file:
        config = json.loads(str(file["config"]))
        arrays = {key: file[key] for key in file.files if is_input(config.get("family"), name, key)}
    return Case(name=name, folder=folder, config=config, arrays=arrays)


def is_input(family: str | None, name: str, array: str) -> bool:
    """Whether an array of a case is given, by the name of both."""
    if "capacity_table" in name:
        return array not in ("capacity", "config")
    patterns = INPUTS.get(family or "", ())
    for case, more in MORE_INPUTS.items():
        patterns += more if fnmatch.fnmatch(name, case) else ()
    return any(fnmatch.fnmatch(array, pattern) for pattern in patterns)


def results(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The recorded results of a case, to compare with."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        family = json.loads(str(file["config"]))["family"]
        return {key: file[key] for key in file.files if key != "config" and not is_input(family, name, key)}
