"""`jmoe convert` as a user types it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import nnx

from jmoe.cli.main import main
from jmoe.convert import vmoe_format
from jmoe.convert.names import nest
from jmoe.models.vit import VisionTransformer
from jmoe.train.imported import load_model

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
SHARDED = GOLDENS / "checkpoint_params_sharded"

# What the arrays do not tell of each recorded network without noise.
OPTIONS = {
    "vit_dense_token": [],
    "vit_token_bpr_lowcap_det": [
        "model.moe.router=TopK(k=2, capacity_factor=0.25, batch_priority=true)",
        "model.moe.images_per_group=4",
    ],
    "vit_gap_sincos_every2": [
        "model.moe.router=TopK(k=1, capacity_factor=2)",
        "model.moe.images_per_group=2",
        "model.image_size=(16, 16)",
    ],
}


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_converted_network_computes_what_the_reference_recorded(name, tmp_path, capsys):
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as golden:
        params = {key.removeprefix("params/"): golden[key] for key in golden.files if key.startswith("params/")}
        images, logits, config = golden["images"], golden["logits"], json.loads(str(golden["config"]))
    assert config["deterministic"]
    vmoe_format.write(tmp_path / "published", nest(params), num_shards=2)
    sets = [word for option in OPTIONS[name] for word in ("--set", option)]
    assert main(["convert", "--from", "vmoe", f"{tmp_path}/published", "--to", f"{tmp_path}/model", *sets]) == 0
    shown = capsys.readouterr().out
    assert f"{len(params)} arrays, {sum(a.size for a in params.values()):,} parameters" in shown

    model, arrays = load_model(tmp_path / "model")
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTransformer(model, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, _numbered(nest({name: jnp.asarray(a) for name, a in arrays.items()})))
    found = jax.jit(lambda state, images: nnx.merge(graph, state)(images).logits)(state, images)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=2e-5)


def _numbered(tree):
    """The numbers of blocks as numbers."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _numbered(value) for key, value in tree.items()}


def test_it_says_what_it_reads_and_what_it_takes_for_granted(tmp_path, capsys):
    assert main(["convert", "--from", "vmoe", str(SHARDED), "--to", str(tmp_path / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "blocks/{1,3}/moe/experts/w_in            (8, 16, 32)    float32" in lines
    assert "74 arrays, 25,434 parameters, 0.1 MB in float32" in lines
    assert lines[-5].startswith("model    ViTConfig(patch_size=4, width=16, depth=4, hidden_dim=32, ")
    assert lines[-4].startswith("assumed  model.moe.router=TopK(k=2, capacity_factor=1.05, ")
    assert lines[-3] == "assumed  model.moe.images_per_group=8, which arrays do not tell; --set changes it"
    assert lines[-2] == "assumed  model.moe.exchange_dtype=None, which arrays do not tell; --set changes it"
    assert lines[-1] == f"written  {tmp_path / 'model'}"
    assert (
        main(["convert", "--from", str(tmp_path / "model"), "--to", "safetensors", str(tmp_path / "m"), "--all"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "blocks/3/moe/experts/w_in        (8, 16, 32)    float32" in lines
    assert not [line for line in lines if line.startswith("assumed")]


def test_there_and_back_again_is_the_same_checkpoint(tmp_path, capsys):
    assert main(["convert", "--from", "vmoe", str(SHARDED), "--to", str(tmp_path / "model")]) == 0
    out = ["--to", "vmoe", str(tmp_path / "x"), "--shards", "3"]
    assert main(["convert", "--from", "jmoe", str(tmp_path / "model"), *out]) == 0
    for path in GOLDENS.glob("checkpoint_params_3shards.*-*"):  # the same arrays, as the reference wrote them
        assert (tmp_path / path.name.replace("checkpoint_params_3shards", "x")).read_bytes() == path.read_bytes()
    assert main(["convert", "--from", str(tmp_path / "model"), *out]) == 2
    assert last_line(capsys).endswith("x already (x.data-00000-of-00003). Choose another, or say --overwrite.")
    assert main(["convert", "--from", str(tmp_path / "model"), *out, "--overwrite"]) == 0


def test_an_index_without_a_version_is_read_on_demand(tmp_path, capsys):
    content = msgpack.unpackb(SHARDED.with_suffix(".index").read_bytes())
    del content["version"]
    (tmp_path / "x.index").write_bytes(msgpack.packb(content))
    for path in GOLDENS.glob("checkpoint_params_sharded.data-*"):
        shutil.copy(path, tmp_path / path.name.replace("checkpoint_params_sharded", "x"))
    convert = ["convert", "--from", "vmoe", str(tmp_path / "x"), "--to", str(tmp_path / "model")]
    assert main(convert) == 2
    assert "has no version: it was written before 20220622" in last_line(capsys)
    assert main([*convert, "--unversioned"]) == 0
    assert main(["convert", "--from", str(tmp_path / "model"), "--to", "vmoe", str(tmp_path / "y")]) == 0
    expected = (GOLDENS / "checkpoint_params_1shard.data-00000-of-00001").read_bytes()
    assert (tmp_path / "y.data-00000-of-00001").read_bytes() == expected


def test_an_original_vit_is_converted(tmp_path, capsys):
    with np.load(GOLDENS / "init_upcycle_vit_to_vmoe.npz", allow_pickle=False) as golden:
        arrays = {name.removeprefix("source/"): golden[name] for name in golden.files if name.startswith("source/")}
    np.savez(tmp_path / "vit.npz", **arrays)
    assert main(["convert", "--from", "vit", str(tmp_path / "vit.npz"), "--to", str(tmp_path / "model"), "--all"]) == 0
    assert "Encoder/encoderblock_0/Mlp/Dense_1/kernel" in capsys.readouterr().out
    assert load_model(tmp_path / "model")[0].depth == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--from", "vmo", "x", "--to", "y"],
            "--from knows no format 'vmo'; the formats are jmoe, vmoe, vit, safetensors.",
        ),
        (["--from", "x", "--to", "vit", "y"], "--to knows no format 'vit'; the formats are jmoe, vmoe, safetensors."),
        (
            ["--from", "x", "--to", "vmoe"],
            "--to vmoe names a format and no path. If a folder is called so, write ./vmoe.",
        ),
        (
            ["--from", "vmoe", "a", "b", "--to", "y"],
            "--from takes a path, or one of the formats jmoe, vmoe, vit, safetens",
        ),
        (
            ["--from", "x.npz", "--to", "y"],
            "Without a format --from takes a folder of jmoe; by its name x.npz is another: --from vit x.npz.",
        ),
        (
            ["--from", "x", "--to", "y.safetensors"],
            "Without a format --to takes a folder of jmoe; by its name y.safetensors is another: --to safetensors y.s",
        ),
        (["--from", "x", "--to", "y", "--shards", "2"], "--shards=2 is for --to vmoe; jmoe is written in one piece."),
        (
            ["--from", "x", "--to", "y"],
            "x holds no checkpoints: it is neither the folder of a run nor a converted one.",
        ),
        (
            ["--from", "vmoe", "x", "--to", "y"],
            "There is no file x.index. Give the PREFIX of PREFIX.index, without its",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == 2
    assert expected in last_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_can_be_evaluated(tmp_path):
    """End to end: a network of the digits in the published layout, converted, and evaluated by another program."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JMOE_DATA_DIR": str(tmp_path / "datasets")}
    rng = np.random.default_rng(0)
    D, F, E = 64, 128, 8
    arrays = {
        "embedding": {"kernel": (2, 2, 1, D), "bias": (D,)},
        "cls": (1, 1, D),
        "head": {"kernel": (D, 10), "bias": (10,)},
        "Encoder": {"posembed_input": {"pos_embedding": (1, 17, D)}, "encoder_norm": {"scale": (D,), "bias": (D,)}},
    }
    norm = {"scale": (D,), "bias": (D,)}
    heads = {name: {"kernel": (D, 4, 16), "bias": (4, 16)} for name in ("query", "key", "value")}
    heads["out"] = {"kernel": (4, 16, D), "bias": (D,)}
    for i in range(4):
        e = (E,) if i % 2 else ()
        mlp = {"Dense_0": {"kernel": (*e, D, F), "bias": (*e, F)}, "Dense_1": {"kernel": (*e, F, D), "bias": (*e, D)}}
        inner = {"Moe": {"Mlp": mlp, "Router": {"dense": {"kernel": (D, E)}}}} if i % 2 else {"Mlp": mlp}
        arrays["Encoder"][f"encoderblock_{i}"] = {
            "LayerNorm_0": norm,
            "LayerNorm_1": norm,
            "SelfAttention": heads,
        } | inner
    drawn = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32) / 8, arrays, is_leaf=lambda x: type(x) is tuple
    )
    vmoe_format.write(tmp_path / "digits", drawn)

    assert main(["convert", "--from", "vmoe", f"{tmp_path}/digits", "--to", f"{tmp_path}/model"]) == 0
    command = [sys.executable, "-m", "jmoe", "evaluate", "experiments/digits_vmoe.py", "--workdir", f"{tmp_path}/model"]
    pipes = {"capture_output": True, "text": True}
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, timeout=120, check=True, **pipes)
    assert "The model is the converted one of" in done.stderr
    result = json.loads(done.stdout)
    assert (result["step"], result["images"]) == (0, 360)
    assert 0 < result["accuracy"] < 0.5
