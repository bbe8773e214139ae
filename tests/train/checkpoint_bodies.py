"""What the processes of the tests of checkpoints do, and the state that they save: random bits, on any mesh."""

import itertools
import json
import logging
import os
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.errors import UserError
from jmoe.paths import path_names
from jmoe.train import agreement, checkpoint
from jmoe.train.checkpoint import Checkpointer

AXES = ("data", "fsdp", "expert", "model")


class Usage(nnx.Variable):
    """Stands for the state of a router."""


def abstract(mesh: Mesh, size: int = 10):
    """Structure, shapes and shardings of a training state: Adam's moments, state of a router, random keys, a step."""

    def make():
        experts = nnx.Dict(w_in=nnx.Param(jnp.zeros((8, 6, size))), bias=nnx.Param(jnp.zeros((8, 4), jnp.bfloat16)))
        router = nnx.Dict(usage=Usage(jnp.zeros((8,), jnp.int32)), seen=Usage(jnp.zeros((), jnp.uint8)))
        head, scale = nnx.Param(jnp.zeros((16, 5))), nnx.Param(jnp.zeros(3))
        model = nnx.Dict(experts=experts, head=head, scale=scale, router=router)
        _, params, variables = nnx.split(model, nnx.Param, ...)
        state = {"step": jnp.int32(0), "params": params, "variables": variables}
        state |= {"optimizer": optax.adam(1e-3, mu_dtype=jnp.bfloat16).init(params), "empty": jnp.zeros((0, 3))}
        return state | {"key": jax.random.key(0), "keys": jax.random.split(jax.random.key(0), 8)}

    def spec(name):
        if "experts/w_in" in name:
            return PartitionSpec("expert", None, "model")
        if "experts/bias" in name or name.endswith("usage"):
            return PartitionSpec("expert")
        return PartitionSpec(("data", "fsdp")) if name.endswith(("head", "keys")) else PartitionSpec()

    leaves, treedef = jax.tree.flatten(jax.eval_shape(make))
    names = path_names(treedef.unflatten(leaves))
    shardings = [NamedSharding(mesh, spec(name)) for name in names]
    pairs = zip(leaves, shardings, strict=True)
    return treedef.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s) for leaf, s in pairs])


def mesh_of(*shape: int) -> Mesh:
    """The mesh of this shape, in the order of AXES, on the first devices of the job."""
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def random_bits(seed, wanted):
    """One array of random bits for each leaf; of a key, its data."""
    rng = np.random.default_rng(seed)
    for leaf in jax.tree.leaves(wanted):
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        yield np.frombuffer(rng.bytes(data.size * data.dtype.itemsize), data.dtype).reshape(data.shape)


def is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def random_state(seed, wanted):
    """A state of random bits, placed as wanted; the same bits on any mesh."""

    def place(bits, leaf):
        array = jax.make_array_from_callback(bits.shape, leaf.sharding, lambda index: bits[index])
        return jax.jit(jax.random.wrap_key_data, out_shardings=leaf.sharding)(array) if is_key(leaf) else array

    leaves, treedef = jax.tree.flatten(wanted)
    return treedef.unflatten([place(*pair) for pair in zip(random_bits(seed, wanted), leaves, strict=True)])


def check_bits(state, seed, wanted):
    """Fails unless a state is `random_state(seed, wanted)`: structure, shapes, dtypes, shardings and bits."""
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    lists = (path_names(wanted), jax.tree.leaves(state), jax.tree.leaves(wanted), random_bits(seed, wanted))
    for name, leaf, asked, bits in zip(*lists, strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (asked.shape, asked.dtype, asked.sharding), name
        for shard in (jax.random.key_data(leaf) if is_key(leaf) else leaf).addressable_shards:
            assert np.asarray(shard.data).tobytes() == bits[shard.index].tobytes(), (name, shard.index)


def from_mesh_to_mesh(directory: str):
    """One process: saves on each mesh, and restores that onto the next."""
    shapes = [(8, 1, 1, 1), (1, 1, 4, 1), (1, 1, 1, 1), (1, 1, 8, 1), (2, 1, 2, 2), (1, 8, 1, 1)]
    meshes = [mesh_of(*shape) for shape in shapes]
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(0, random_state(0, abstract(meshes[0])), {}, wait=True)
        for step, mesh in enumerate(meshes[1:], start=1):
            restored, _, last = checkpointer.restore_latest(abstract(mesh))
            check_bits(restored, step - 1, abstract(mesh))
            checkpointer.save(step, random_state(step, abstract(mesh)), {}, wait=True)
            print(last, mesh.devices.shape)


def goes_on(directory: str, data: str, expert: str):
    """Restores what is there onto this mesh, checks it, trains while it saves the next, and says what it found."""
    mesh = mesh_of(int(data), 1, int(expert), 1)
    wanted = abstract(mesh)
    with Checkpointer(directory) as checkpointer:
        last = checkpointer.latest()
        if last is not None:
            restored, metadata, step = checkpointer.restore_latest(wanted)
            assert (step, metadata) == (last, {"seed": last})
            check_bits(restored, step, wanted)
        step = 0 if last is None else last + 1
        checkpointer.save(step, random_state(step, wanted), {"seed": step})
        everywhere = NamedSharding(mesh, PartitionSpec(AXES))
        numbers = jax.make_array_from_callback((8,), everywhere, lambda index: np.arange(8.0)[index])
        # With the exchange of the devices, during that of the save. One at a time: on CPU, eight devices of one process
        # wait for each other for ever if several are under way, with checkpoints or without.
        assert {float(jax.jit(jnp.sum)(numbers)) for _ in range(50)} == {28.0}
        checkpointer.wait()
        print(json.dumps([last, checkpointer.steps()]))


def _sentence(action) -> str:
    """The UserError that it raises."""
    try:
        action()
    except UserError as error:
        return str(error)
    raise AssertionError("it raised nothing")


def troubles(directory: str):
    """Two processes: what goes wrong in one of them; each prints what it raised, and what it did then."""
    folder, process = pathlib.Path(directory), jax.process_index()
    handler = logging.Handler()
    warnings: list[str] = []
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("jmoe").addHandler(handler)
    wanted = abstract(mesh_of(1, 1, 2, 1), size=2000)
    checkpoint.VISIBLE_SECONDS = 0.5
    said: dict = {}

    # An array that all devices hold is written once.
    whole = NamedSharding(mesh_of(1, 1, 2, 1), PartitionSpec())
    noise = {"w": jax.ShapeDtypeStruct((400_000,), jnp.uint8, sharding=whole)}
    with Checkpointer(folder / "replicated") as checkpointer:
        checkpointer.save(1, random_state(1, noise), {}, wait=True)
        check_bits(checkpointer.restore(1, noise)[0], 1, noise)
        said["bytes"] = sum(file.stat().st_size for file in (folder / "replicated").rglob("*") if file.is_file())

    # A file that one process sees damaged: it has a folder of its own that looks like that of the other.
    shared = folder / "shared"
    with Checkpointer(shared) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, random_state(step, wanted), {})
    other = folder / "other"
    if process == 1:
        shutil.copytree(shared, other)
        largest = max((other / "2").rglob("*"), key=lambda file: file.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 1)
    with Checkpointer(shared if process == 0 else other) as checkpointer:
        said["damaged"] = _sentence(lambda: checkpointer.restore(2, wanted))
        restored, _, said["used instead"] = checkpointer.restore_latest(wanted)
        check_bits(restored, 1, wanted)
    said["warnings"] = list(warnings)

    # A folder that is another one for each process.
    said["other list"] = _sentence(lambda: Checkpointer(shared if process == 0 else folder / "none"))
    with Checkpointer(folder / f"own {process}") as checkpointer:
        said["not shared"] = _sentence(lambda: checkpointer.save(3, random_state(3, wanted), {}))

    # A disk that is full for one process, as a limit on the size of its files.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(shared) as checkpointer:
        for slow in (0.0, 0.5):  # both where the other is still writing, and where it has long been waiting
            if process == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
                time.sleep(slow)
            checkpointer.save(3, random_state(3, wanted), {})
            said[f"full {slow}"] = _sentence(checkpointer.wait)
            said[f"after full {slow}"] = sorted(path.name for path in shared.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpointer.save(3, random_state(3, wanted), {}, wait=True)
        said["space again"] = checkpointer.steps()

    # A process that does not come, and one that comes for something else.
    with Checkpointer(shared) as checkpointer:
        said["another step"] = _sentence(lambda: checkpointer.save(4 + process, random_state(4, wanted), {}))
        agreement.SECONDS = 1.0
        if process == 1:
            time.sleep(2)
        said["late"] = _sentence(lambda: checkpointer.save(4, random_state(4, wanted), {}))
        said["steps"] = checkpointer.steps()
        agreement.SECONDS = 60.0
        checkpointer.save(3, random_state(3, wanted), {}, wait=True)
        said["saved after that"] = checkpointer.steps()
    print(json.dumps(said))


def saves_for_ever(directory: str, data: str, expert: str):
    """Saves one step after the other, saying which, until it is killed or ended because another was."""
    wanted = abstract(mesh_of(int(data), 1, int(expert), 1), size=20_000)
    with Checkpointer(directory) as checkpointer:
        for step in itertools.count((checkpointer.latest() or 0) + 1):
            checkpointer.save(step, random_state(step, wanted), {"seed": step})
            print("saving", step, flush=True)


def restores(directory: str, data: str, expert: str):
    """Restores what `saves_for_ever` left, onto another mesh, and says which step that was."""
    wanted = abstract(mesh_of(int(data), 1, int(expert), 1), size=20_000)
    with Checkpointer(directory) as checkpointer:
        restored, metadata, step = checkpointer.restore_latest(wanted)
    assert metadata == {"seed": step}
    check_bits(restored, step, wanted)
    print(step)
