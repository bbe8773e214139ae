"""The exchange of tokens between devices: one all-to-all along `expert` to the experts, and one back.

Everything before and after concerns the groups of one device alone. Slots of a capacity go by `all_to_all`, on every
backend: [E, N, D], all experts with the N slots of one device's groups, becomes [E / n, n * N, D], the experts of one
device with the slots of n devices. Rows without slots (dropless layers) go by `ragged_all_to_all` where the platform
has it, and elsewhere by an all-to-all of blocks as large as they can get.

The gradient of an all-to-all is the one in the other direction: 2 forward and 2 backward in a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.notation import Array, Float, Int, PRNGKeyArray
from jmoe.parallel.mesh import AXES, BATCH, batch_parts
from jmoe.paths import path_names
from kernels_pallas import gather_rows

ROWS = ("data", "fsdp")  # the batch axes along which slots are divided while they are with their experts
RAGGED_CHIPS = ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")  # v5e refuses ragged_all_to_all, CPU lacks it
ASYNCHRONOUS = 16  # the most chips of an asynchronous all-to-all


class Exchange:
    """Divides groups among the devices of a mesh, and carries tokens to their experts and back.

    See `jmoe.nn.exchange.Exchange` for what a layer asks of it. Pass it to a layer or a model that is called under
    `jax.jit` with the mesh in `jax.set_mesh`:

        mesh = jmoe.parallel.build(Mesh(expert=8), num_experts=8)
        exchange = jmoe.parallel.Exchange(mesh)
        apply = jax.jit(lambda layer, x: layer(x, exchange=exchange), compiler_options=exchange.compiler_options)
        with jax.set_mesh(mesh):
            output = apply(layer, x)

    Attributes:
      mesh: that of the devices.
      parts: in how many images and groups are divided.
      expert_parts: in how many experts are.
      ragged: whether rows without slots go by `ragged_all_to_all`.
      overlaps: whether devices compute while tokens travel, for which a layer lets some groups go after others.
      compiler_options: for `jax.jit`, what makes it so: a TPU waits for every all-to-all unless its compiler is told.
    """

    def __init__(self, mesh: jax.sharding.Mesh, *, ragged: bool | None = None, overlaps: bool | None = None):
        """Prepares for a mesh of `jmoe.parallel.build`.

        Args:
          mesh: with the axes AXES.
          ragged: whether rows without slots go by `ragged_all_to_all`; None where the devices of the mesh have it.
          overlaps: whether devices compute while tokens travel; None where they can.

        Raises:
          ValueError: the mesh lacks one of the axes.
        """
        missing = [name for name in AXES if name not in mesh.shape]
        if missing:
            raise ValueError(
                f"Exchange wants a mesh with the axes {', '.join(AXES)}; it lacks {', '.join(missing)}. "
                "jmoe.parallel.build makes such a mesh."
            )
        self.mesh = mesh
        kind = mesh.devices.flat[0].device_kind
        self.ragged = kind in RAGGED_CHIPS if ragged is None else ragged
        self.parts = batch_parts(mesh)
        self.expert_parts = mesh.shape["expert"]
        self.overlaps = _can_overlap(mesh) if overlaps is None else overlaps
        on_tpu = mesh.devices.flat[0].platform == "tpu"
        self.compiler_options = {"xla_tpu_enable_async_all_to_all": "true"} if on_tpu and self.overlaps else {}

    def split(self, x: Array, axis: int = 0) -> Array:
        """Says that an axis (images, groups) is divided among devices."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*[None] * axis, BATCH)))

    def per_group(
        self,
        function: Callable[..., Any],
        *trees: Any,
        in_axes: int | tuple[int, ...] = 0,
        out_axes: int = 0,
        kernels: bool = False,
    ) -> Any:
        """Calls function(*trees) on every device with its groups, which lie along the axes named as in `jax.vmap`.

        Without kernels `model` is left to XLA, and function may be anything: JAX's check of what differs between
        devices, which wants the start of every loop annotated, is off, as everything is divided here.
        """
        axes = (in_axes,) * len(trees) if isinstance(in_axes, int) else in_axes
        inputs = [PartitionSpec(*[None] * axis, BATCH) for axis in axes]
        outputs = PartitionSpec(*[None] * out_axes, BATCH)
        if kernels:
            return self._map(function, inputs, outputs)(*trees)
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(inputs),
            out_specs=outputs,
            axis_names=set(BATCH),
            check_vma=False,
        )
        return mapped(*trees)

    def to_experts(self, slots: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """Brings slots, which lie with their tokens, to the devices of their experts.

        N counts the slots of all devices along the batch axes, one device after the other; in the result each device
        has those of its experts that came from the devices it shares the axes ROWS with.
        """
        return self._map(self.slots_to_experts, [PartitionSpec(None, BATCH)], PartitionSpec("expert", ROWS))(slots)

    def to_tokens(self, outputs: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """Undoes `to_experts`."""
        return self._map(self.slots_to_tokens, [PartitionSpec("expert", ROWS)], PartitionSpec(None, BATCH))(outputs)

    def with_experts(
        self, function: Callable[..., Any], parameters: Any, axes: Mapping[str, str], *trees: Any, key: Any = None
    ) -> Any:
        """Calls function(parameters, carrier, *trees, key) on every device with its experts and its groups.

        Every device has a key of its own, so that what is drawn by it depends on the mesh.
        """
        leaves, treedef = jax.tree.flatten(parameters)
        letters = [axes[name.split("/")[-1]] for name in path_names(parameters)]
        by_letter = {"E": "expert", "F": "model"}
        specs = [PartitionSpec(*(by_letter.get(letter) for letter in written)) for written in letters]

        def on_device(leaves: Sequence[Array], key: Any, *trees: Any) -> Any:
            first = jax.lax.axis_index("model") == 0
            ours = [p if "F" in written else jnp.where(first, p, 0) for p, written in zip(leaves, letters, strict=True)]
            # Said here, because the gradients of kernels do not add up over devices what all of them have alike.
            ours = [_varying(p) for p in ours]
            if key is not None and self.parts > 1:
                key = jax.random.fold_in(key, jax.lax.axis_index(BATCH))
            return function(treedef.unflatten(ours), self, *trees, key)

        inputs = [specs, PartitionSpec(), *[PartitionSpec(BATCH)] * len(trees)]
        return self._map(on_device, inputs, PartitionSpec(BATCH))(leaves, key, *trees)

    # What follows is for functions that run on every device: the layer's carrier.

    def slots_to_experts(self, slots: Float[Array, "E N D"]) -> Float[Array, "e n D"]:
        """Sends the slots of all experts away and returns those of all devices for the experts here."""
        n = self.expert_parts
        if n == 1:
            return slots
        # Blocks for devices are exchanged along an axis of their own: along that of slots, the compiler for TPU moves
        # single rows to other layouts and back, which takes longer than the exchange.
        E, N, D = slots.shape
        blocks = slots.reshape(n, E // n, N, D)
        blocks = jax.lax.all_to_all(blocks, "expert", split_axis=0, concat_axis=0, tiled=True)
        return blocks.swapaxes(0, 1).reshape(E // n, n * N, D)

    def slots_to_tokens(self, outputs: Float[Array, "e n D"]) -> Float[Array, "E N D"]:
        """Undoes `slots_to_experts`."""
        n = self.expert_parts
        if n == 1:
            return outputs
        e, N, D = outputs.shape
        blocks = outputs.reshape(e, n, N // n, D).swapaxes(0, 1)
        blocks = jax.lax.all_to_all(blocks, "expert", split_axis=0, concat_axis=0, tiled=True)
        return blocks.reshape(e * n, N // n, D)

    def rows_to_experts(
        self, rows: Float[Array, "N D"], group_sizes: Int[Array, " E"], limit: int
    ) -> tuple[Float[Array, "M D"], Int[Array, " e"], Callable[[Float[Array, "M D"]], Float[Array, "N D"]]]:
        """Sends rows that are sorted by expert to the devices of their experts; see `jmoe.nn.exchange.Carrier`."""
        n = self.expert_parts
        if n == 1:
            return rows, group_sizes, lambda outputs: outputs
        sent = group_sizes.reshape(n, -1)  # [n, e]: to each device, for each of its experts
        received = jax.lax.all_to_all(sent, "expert", split_axis=0, concat_axis=0, tiled=True)  # [n, e]: from each
        # 1. Rows in blocks, one for each device. 2. The blocks exchanged. 3. Rows sorted by expert again.
        into = _block_places(jnp.sum(sent, axis=1), rows.shape[0], limit)  # [N]
        order = _sorted_places(received, limit)  # [n * limit]
        blocks = _move(rows, into, n * limit)
        arrived = self._exchange_blocks(blocks, sent, received, limit)
        ours = _move(arrived, order, n * limit)

        def back(outputs: Float[Array, "M D"]) -> Float[Array, "N D"]:
            arrived = _move(outputs, _inverse(order, n * limit), n * limit)
            blocks = self._exchange_blocks(arrived, received, sent, limit)
            return _move(blocks, _inverse(into, n * limit), rows.shape[0])

        return ours, jnp.sum(received, axis=0), back

    def key_of_part(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """Of devices that share the hidden units, each its own."""
        return jax.random.fold_in(key, jax.lax.axis_index("model")) if self.mesh.shape["model"] > 1 else key

    def to_parts(self, rows: Float[Array, "..."]) -> Float[Array, "..."]:
        """Gives the same rows to all devices that share the hidden units; must come before the experts."""
        return _varying(rows)

    def sum_parts(self, outputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Adds up what the devices made of their parts of the hidden units."""
        return jax.lax.psum(outputs, "model")

    def _exchange_blocks(
        self, blocks: Float[Array, "M D"], sent: Int[Array, "n e"], received: Int[Array, "n e"], limit: int
    ) -> Float[Array, "M D"]:
        """Exchanges n blocks of `limit` rows, of which the first are used: as many as the sums of `sent` say."""
        n = self.expert_parts
        if not self.ragged:
            return jax.lax.all_to_all(blocks, "expert", split_axis=0, concat_axis=0, tiled=True)
        starts = limit * jnp.arange(n, dtype=jnp.int32)
        mine = jnp.full((n,), limit, jnp.int32) * jax.lax.axis_index("expert")  # my block, on every device
        return jax.lax.ragged_all_to_all(
            blocks,
            jnp.zeros_like(blocks),
            starts,
            jnp.sum(sent, axis=1).astype(jnp.int32),
            mine,
            jnp.sum(received, axis=1).astype(jnp.int32),
            axis_name="expert",
        )

    def _map(self, function: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(inputs), out_specs=outputs)


def _can_overlap(mesh: jax.sharding.Mesh) -> bool:
    """Whether the compiler has an asynchronous all-to-all along `expert`: by what libtpu 0.0.42 to 0.0.52 compiles.

    It has none over more than 16 chips, where it waits all the same, and none on slices of v5e of more than 16 chips,
    where it refuses to compile. What GPUs do meanwhile has not been measured.
    """
    device, n = mesh.devices.flat[0], mesh.shape["expert"]
    if device.platform != "tpu" or not 1 < n <= ASYNCHRONOUS:
        return False
    return device.device_kind not in ("TPU v5 lite", "TPU v5e") or mesh.size <= ASYNCHRONOUS


def _varying(x: Array) -> Array:
    """The same array, which JAX now takes to differ between all devices; its gradient is summed over them."""
    return jax.lax.pcast(x, tuple(set(AXES) - jax.typeof(x).manual_axis_type.varying), to="varying")


def _block_places(sizes: Int[Array, " n"], num_rows: int, limit: int) -> Int[Array, " N"]:
    """For each row, sorted by block with `sizes` rows in each, its place in blocks of `limit`; past the end if none."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(num_rows, dtype=sizes.dtype)
    block = jnp.searchsorted(ends, row, side="right").astype(sizes.dtype)  # n for what belongs to nobody
    start = jnp.take(ends - sizes, block, mode="clip")
    return jnp.where(block < sizes.shape[0], block * limit + row - start, sizes.shape[0] * limit)


def _sorted_places(received: Int[Array, "n e"], limit: int) -> Int[Array, " M"]:
    """For each place in n blocks of `limit`, each sorted by expert, its place among all rows sorted by expert."""
    n, num_experts = received.shape
    ends = jnp.cumsum(received, axis=1)  # [n, e], in each block
    totals = jnp.sum(received, axis=0)  # [e]
    first = (jnp.cumsum(totals) - totals)[None] + jnp.cumsum(received, axis=0) - received  # [n, e]: of block and expert
    row = jnp.arange(limit, dtype=received.dtype)
    expert = jax.vmap(lambda end: jnp.searchsorted(end, row, side="right"))(ends).astype(received.dtype)  # [n, limit]
    clipped = jnp.minimum(expert, num_experts - 1)
    offset = jnp.take_along_axis(first - (ends - received), clipped, axis=1)
    return jnp.where(expert < num_experts, offset + row[None], n * limit).reshape(-1)


def _inverse(places: Int[Array, " N"], size: int) -> Int[Array, " M"]:
    """For each of `size` places the row that goes there; the number of rows where none does."""
    rows = jnp.arange(places.shape[0], dtype=places.dtype)
    return jnp.full((size,), places.shape[0], places.dtype).at[places].set(rows, mode="drop")


def _move(rows: Float[Array, "N D"], places: Int[Array, " N"], size: int) -> Float[Array, "M D"]:
    """Puts each row in its place of `size`; a gather, and so is its gradient. Places without a row are zero."""
    return gather_rows(rows, jnp.minimum(places, size)[:, None], _inverse(places, size))
