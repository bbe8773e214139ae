"""Replays `init_*`: initialisation from other checkpoints, by rules of names and transforms of arrays."""

import jax
import numpy as np

from jmoe.convert.transforms import apply_rules, renumber_modules
from tests.goldens.case import Case

# The options of the recorded trainer, its defaults, and ours; "raise" is the opposite of ours.
_OPTIONS = {
    "raise_if_dtype_mismatched": (False, "cast"),
    "raise_if_shape_mismatched": (True, "broadcast"),
    "raise_if_source_unmatched": (True, "keep_unmatched_names"),
    "raise_if_target_unmatched": (True, "keep_unmatched_targets"),
}
_VIT_ZOOM = [("^(.*)$", r"\1", "vit_zoom")]
_ZOOM = [("^(.*)$", r"\1", "zoom")]


def replay(case: Case) -> dict[str, np.ndarray]:
    """Returns `output/*` of rules, `c#/output` of positions, and `zoom/output`."""
    results = {}
    if "rules" in case.config:
        results |= {f"output/{name}": value for name, value in _apply(case).items()}
    for i, grid in enumerate(case.config.get("cases", ())):
        source = case.arrays[f"c{i}/source"]
        shape = (1, grid["target_grid"] ** 2 + grid["target_has_token"], source.shape[2])
        wanted = case.arrays[f"c{i}/target"] if grid["target_is_array"] else jax.ShapeDtypeStruct(shape, source.dtype)
        results[f"c{i}/output"] = apply_rules({"positions": source}, {"positions": wanted}, _VIT_ZOOM)["positions"]
    if "zoom_target_shape" in case.config:
        source = case.arrays["zoom/source"]
        wanted = jax.ShapeDtypeStruct(tuple(case.config["zoom_target_shape"]), source.dtype)
        results["zoom/output"] = apply_rules({"x": source}, {"x": wanted}, _ZOOM)["x"]
    return results


def _apply(case: Case) -> dict[str, np.ndarray]:
    source = case.group("source")
    if "source_names" in case.config:  # old numbering; names numbered per type stay as they are
        renamed = renumber_modules(source)
        source = {renamed[name]: value for name, value in source.items()}
    if unknown := {key for key in case.config if key.startswith("raise_if_")} - set(_OPTIONS):
        raise ValueError(f"{case.name} has options that this replay does not know: {', '.join(sorted(unknown))}.")
    options = {ours: not case.config.get(theirs, default) for theirs, (default, ours) in _OPTIONS.items()}
    return apply_rules(source, case.group("target"), case.config["rules"], **options)
