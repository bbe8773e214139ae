"""Preprocessing of evaluation: single operations, labels, and whole pipelines from the bytes of a file."""

import numpy as np

from jmoe.data.preprocess import Keep, Step, parse_pipeline
from tests.goldens.case import Case


def replay(case: Case) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for option in case.config.get("ops", ()):
        i, steps = option["id"], parse_pipeline(option["process"])
        if f"{i}/label" in case.arrays:
            features = {"label": case.arrays[f"{i}/label"]}
        else:
            features = {"image": case.arrays["image"]}
        written = next(step.outkey for step in reversed(steps) if isinstance(step, Step))
        found[f"{i}/output"] = run(steps, features)[written]
    for option in case.config.get("pipelines", ()):
        i, steps = option["id"], parse_pipeline(option["process"])
        features = {"image": case.arrays[f"{i}/encoded_bytes"].tobytes()}
        if features["image"].startswith(b"\xff\xd8"):  # JPEG leaves decoders some freedom
            features, steps = {"image": case.arrays[f"{i}/decoded"]}, steps[1:]
        if option.get("label") is not None:
            features["label"] = np.array(option["label"], np.int32)
        found |= {f"{i}/out/{key}": np.asarray(value) for key, value in run(steps, features).items()}
    if not found:
        raise ValueError(f"{case.name} names neither ops nor pipelines")
    return found


def run(steps: tuple[Step | Keep, ...], features: dict) -> dict:
    for step in steps:
        features = step(features)
    return features
