"""Two tables about layouts of a V-MoE over TPU chips, by the compiler's bound: nothing is run, no TPU is needed.

    python benchmarks/layouts.py reference [--topology v5e:4x4] [--images 16] [--json]
    python benchmarks/layouts.py scaling [--topologies v5e:2x4 v5e:16x16] [--images 16] [--json]

`reference` puts jmoe beside the layout of google-research/vmoe: two axes of the mesh, everything but experts on every
chip, tokens dispatched by one-hot matrices, and the partitioner left to find the all-to-all. `scaling` puts the step of
B/16 on few chips beside that on many, once with experts on different chips and once with everything on all of them.

A program takes minutes to compile. What was read off it is kept in benchmarks/results/layouts.json and taken from there
the next time; --again compiles it anew. README.md beside this file says what is measured.
"""

# ruff: noqa: E402 - the path is set before anything is imported from the checkout

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout need not be installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the chips are the compiler's alone

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.analysis.bound import bound, repeated
from jmoe.analysis.chips import CHIPS, Chip
from jmoe.analysis.hlo import parse
from jmoe.errors import UserError
from jmoe.models.vit import ViTConfig, moe_of_block
from jmoe.nn.exchange import Exchange
from jmoe.nn.moe import MoEMlp
from jmoe.notation import Array, Bool, Float
from jmoe.parallel import Exchange as MeshExchange
from jmoe.parallel import Mesh, build, topology_devices
from jmoe.parallel.mesh import BATCH, batch_parts
from jmoe.parallel.rules import shardings
from jmoe.parallel.topology import compiling_for
from jmoe.plan.compiling import versions
from jmoe.routing import Routing
from jmoe.train.compiled import divided, make_program, whole
from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment
from jmoe.train.overrides import apply_overrides

EXPERIMENT = "experiments/vmoe_b16_imagenet21k.py"
RESULTS = ROOT / "benchmarks" / "results" / "layouts.json"
LARGE = 384  # pixels: of the comparison with the reference layout
FINE_TUNING = (  # the recipe for images of that size, on ImageNet-1k
    "model.num_classes=1000",
    "model.head_bias=none",
    "model.moe.router.capacity_factor=1.5",
    "loss=softmax",
    "mixup=0.0",
    "optimizer=SGD(peak_lr=0.003, momentum=0.9, warmup_steps=500, decay=Cosine(), clip_norm=10.0)",
    "steps=10000",
)
PARTS = ("layer", "last-2", "every-2")
# Of the bounds, ours over the reference layout's; and of a step on few chips over one on many.
AT_MOST = {"layer": 0.5, "last-2": 0.85, "every-2": 0.7}
AT_LEAST = 0.9


class ReferenceExchange:
    """The layout of google-research/vmoe, as an exchange that a layer or a step of jmoe takes.

    Groups are divided over both axes, and experts over one. Dispatch and combine are products with one-hot matrices
    [G, S, E, C], tokens in bfloat16 and weights in float32. Slots, with their groups in front, are viewed by the device
    that they come from and the one that they go to; those axes are swapped, and the result is said to be divided as
    before: the partitioner makes an all-to-all of it. Nothing is mapped over devices by hand.

    Where its code numbers groups with the expert axis first, this does with the data axis first, as the batch lies
    here: what is sent between which chips is the same.
    """

    def __init__(self, mesh: jax.sharding.Mesh, asynchronous: bool = False):
        """Prepares for a mesh with the axes of jmoe, of which fsdp and model are 1; perhaps with jmoe's options."""
        assert mesh.shape["fsdp"] == mesh.shape["model"] == 1
        self.mesh = mesh
        self.parts = batch_parts(mesh)
        self.expert_parts, self.overlaps = 1, False  # the layer is neither to cut nor to pad what is exchanged here
        self.compiler_options = MeshExchange(mesh).compiler_options if asynchronous else {}

    def split(self, x: Array) -> Array:
        """Divides axis 0 over both axes."""
        return self._constrained(x, BATCH)

    def per_group(
        self,
        function: Callable[..., Any],
        *trees: Any,
        in_axes: int | tuple[int, ...] = 0,
        out_axes: int = 0,
        kernels: bool = False,
    ) -> Any:
        """Leaves what concerns a group alone to the partitioner; what would move tokens is done as published."""
        if not kernels:
            return function(*trees)
        x, routing = trees
        assert isinstance(routing, Routing)
        if out_axes == 1:
            slots = published_dispatch(self.split(x), routing)  # [G, E, C, D]
            return self.split(slots).swapaxes(0, 1).reshape(routing.num_experts, -1, x.shape[-1])
        assert in_axes == (1, 0)
        E, D, C = routing.num_experts, x.shape[-1], routing.capacity
        slots = self.split(x.reshape(E, -1, C, D).swapaxes(0, 1))  # [G, E, C, D]
        return self.split(published_combine(slots, routing))

    def to_experts(self, slots: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """Brings slots to the devices of their experts."""
        E, N, D = slots.shape
        data, n = self.mesh.shape["data"], self.mesh.shape["expert"]
        view = slots.reshape(n, E // n, data, n, N // (data * n), D)  # to, expert there, replica, from, slot, D
        view = self._constrained(view.transpose(2, 3, 0, 1, 4, 5), "data", "expert")
        view = self._constrained(view.swapaxes(1, 2), "data", "expert")  # replica, to, from, expert there, slot, D
        here = view.transpose(1, 3, 0, 2, 4, 5).reshape(E, N, D)
        return self._constrained(here, "expert", "data")

    def to_tokens(self, outputs: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """Undoes `to_experts`."""
        E, N, D = outputs.shape
        data, n = self.mesh.shape["data"], self.mesh.shape["expert"]
        outputs = self._constrained(outputs, "expert", "data")
        view = outputs.reshape(n, E // n, data, n, N // (data * n), D)  # here, expert here, replica, to, slot, D
        view = self._constrained(view.transpose(2, 0, 3, 1, 4, 5), "data", "expert")
        view = self._constrained(view.swapaxes(1, 2), "data", "expert")  # replica, to, here, expert here, slot, D
        return view.transpose(2, 3, 0, 1, 4, 5).reshape(E, N, D)

    def with_experts(
        self, function: Callable[..., Any], parameters: Any, axes: Mapping[str, str], *trees: Any, key: Any = None
    ) -> Any:
        """Is what methods without slots ask for; the reference has slots."""
        raise NotImplementedError("The reference layout has slots; use method 'einsum'.")

    def _constrained(self, x: Array, *axes: str | tuple[str, ...] | None) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


def published_dispatch(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "G E C D"]:
    """Fills slots by a product with a mask of booleans, in the dtype of the tokens; for token choice."""
    return jnp.einsum("GSEC,GSD->GECD", _published_mask(routing), x)


def published_combine(y: Float[Array, "G E C D"], routing: Routing) -> Float[Array, "G S D"]:
    """Sums slots into tokens by a product with combine weights, which are float32."""
    G, S, E, K = routing.token.shape[0], routing.group_size, routing.num_experts, routing.choices
    chosen = jax.nn.one_hot(routing.expert.reshape(G, S, K), E, dtype=jnp.float32)
    gates = jnp.sum(chosen * routing.weight.reshape(G, S, K, 1), axis=2)  # [G, S, E]
    weights = jnp.einsum("GSE,GSEC->GSEC", gates, _published_mask(routing))
    return jnp.einsum("GSEC,GECD->GSD", weights, y).astype(y.dtype)


def _published_mask(routing: Routing) -> Bool[Array, "G S E C"]:
    G, S, E, K = routing.token.shape[0], routing.group_size, routing.num_experts, routing.choices
    assert K is not None  # tokens choose
    chosen = jax.nn.one_hot(routing.expert.reshape(G, S, K), E, dtype=jnp.bool_)
    slot = jnp.max(jnp.where(chosen, routing.slot.reshape(G, S, K, 1), -1), axis=2)  # [G, S, E], -1 for none
    return jax.nn.one_hot(slot, routing.capacity, dtype=jnp.bool_)


class Layout(NamedTuple):
    """What is compared: its title in the tables, its exchange on a mesh, and the method of its layers."""

    title: str
    exchange: Callable[[jax.sharding.Mesh], Exchange]
    method: str


LAYOUTS = {
    "reference": Layout("reference layout", ReferenceExchange, "einsum"),
    "reference-async": Layout(
        "the same, asynchronous", functools.partial(ReferenceExchange, asynchronous=True), "einsum"
    ),
    "jmoe": Layout("jmoe", MeshExchange, "auto"),
    "jmoe-sync": Layout("jmoe, not asynchronous", functools.partial(MeshExchange, overlaps=False), "auto"),
}
COMPARED = ("reference", "reference-async", "jmoe")  # at 384 pixels
COLUMNS = (  # of weak scaling: title, layout, parts of the experts
    ("experts divided, compiled alike", "jmoe-sync", None),
    ("asynchronous where the slice has it", "jmoe", None),
    ("everything everywhere", "jmoe", 1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One program of the tables.

    Attributes:
      part: "layer", value and gradient of a sparse layer as it is in training; or the whole training step of a model
        with sparse layers "last-2" or "every-2".
      recipe: "pre-training", the experiment as it is, or "fine-tuning" of it.
      layout: a name in LAYOUTS.
      topology: the slice.
      data: copies of everything but the experts.
      expert: parts of the experts.
      images: per chip.
      image_size: in pixels.
    """

    part: str
    recipe: str
    layout: str
    topology: str
    data: int
    expert: int
    images: int
    image_size: int

    @property
    def name(self) -> str:
        """Unique among cells."""
        return (
            f"{self.recipe} {self.part} {self.layout} {self.topology} data={self.data},expert={self.expert} "
            f"{self.images}x{self.image_size}px"
        )

    def config(self, experiment: TrainConfig) -> TrainConfig:
        """The experiment with the cell's images, mesh, placement and method, by the recipe."""
        if self.recipe == "fine-tuning":
            experiment = apply_overrides(experiment, FINE_TUNING)
        model = experiment.model
        assert model.moe is not None
        layers = model.moe.layers if self.part == "layer" else self.part
        moe = dataclasses.replace(model.moe, layers=layers, method=LAYOUTS[self.layout].method)
        batch_size = self.images * self.data * self.expert
        return dataclasses.replace(
            experiment,
            model=dataclasses.replace(model, image_size=(self.image_size,) * 2, moe=moe),
            data=dataclasses.replace(experiment.data, batch_size=batch_size, image_size=self.image_size),
            mesh=Mesh(data=self.data, expert=self.expert),
        )


def measure(cell: Cell, experiment: TrainConfig) -> dict[str, Any]:
    """Compiles the program of a cell and returns what its compiler says, as plain data; per chip.

    Raises:
      UserError: there is no such topology, libtpu is not installed, the mesh does not fit, or the program does not fit
        into the memory of a chip.
    """
    config, devices = cell.config(experiment), topology_devices(cell.topology)
    layout = LAYOUTS[cell.layout]
    if cell.part == "layer":
        assert config.model.moe is not None
        mesh = build(config.mesh, devices, config.model.moe.num_experts)
        function, arguments = layer_program(config.model, config.data.batch_size, mesh, layout.exchange(mesh))
    else:
        program = make_program(config, config.steps or 1, devices, layout.exchange)
        mesh, function, arguments = program.mesh, program.step, (program.state, program.batch)
    with compiling_for(mesh):
        try:
            compiled = function.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"{cell.name} does not compile: {' '.join(str(error).split())[:500]}") from error
    return figures(compiled, CHIPS[cell.topology.partition(":")[0]], mesh)


def layer_program(model: ViTConfig, images: int, mesh: jax.sharding.Mesh, exchange: Exchange) -> tuple[Any, Any]:
    """Value and gradient, in parameters and tokens, of the sparse layer of a model, with noise and auxiliary losses.

    Args:
      model: that has the layer.
      images: of all chips.
      mesh: over which they are divided.
      exchange: on that mesh.

    Returns:
      the jitted function, and the shapes of its arguments.
    """
    dtype = jnp.dtype(model.dtype)
    layer = nnx.eval_shape(lambda: MoEMlp(moe_of_block(model), model.width, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)

    def loss(arguments: tuple[nnx.State, Array], key: Array) -> Array:
        output = nnx.merge(graph, arguments[0])(arguments[1], key=key, exchange=exchange)
        # A sum of squares, so that the gradient that comes in is an array like any other.
        return jnp.sum(jnp.square(output.y).astype(jnp.float32)) + sum(output.losses.values())

    where = (shardings(params, mesh), divided(mesh))
    shapes = (params, jax.ShapeDtypeStruct((images, model.tokens, model.width), dtype))
    function = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(where, whole(mesh)),
        out_shardings=(whole(mesh), where),
        compiler_options=exchange.compiler_options,
    )
    return function, (shapes, jax.eval_shape(lambda: jax.random.key(0)))


def figures(compiled: jax.stages.Compiled, chip: Chip, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What a plan says of a program (`jmoe.plan.Plan`), per chip: bytes, FLOPs and the bound of its time."""
    text, cost, memory = parse(compiled.as_text() or ""), compiled.cost_analysis() or {}, compiled.memory_analysis()
    assert memory is not None  # the compiler for TPUs has one
    more = repeated(text)
    found = bound(text, chip, mesh=mesh.shape, coordinates=[device.coords for device in mesh.devices.flat])
    flops = float(cost["flops"]) + more.flops
    sent = sum((row.sent for row in found.traffic), 0.0)
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return {
        "seconds": max(found.seconds, flops / chip.flops, sent / chip.ici),
        "compiler": found.compiler,
        "kernels": found.kernels,
        "others": found.others,
        "collectives": found.collectives,
        "uncounted": dict(found.uncounted),
        "flops": flops,
        "bytes": float(cost["bytes accessed"]) + more.bytes,
        "sent": sent,
        "traffic": [dataclasses.asdict(row) | {"axes": list(row.axes)} for row in found.traffic],
        "temporary": memory.temp_size_in_bytes,
        "peak": arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
    }


class Store:
    """What was read off programs, kept in a file by the names of cells."""

    def __init__(self, path: pathlib.Path, experiment: TrainConfig, again: str | None = None):
        """Reads the file if there is one; what it has of the layout `again`, or of "all", is compiled as well."""
        self.path, self.experiment, self.again = path, experiment, again
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell, compiled if the file lacks them."""
        if self.again in (cell.layout, "all") or cell.name not in self.known:
            started = time.monotonic()
            _say(f"{cell.name}: compiling")
            found = measure(cell, self.experiment)
            _say(f"{cell.name}: {time.monotonic() - started:.0f} s")
            # Others may have written meanwhile.
            self.known |= json.loads(self.path.read_text()) if self.path.exists() else {}
            self.known[cell.name] = {"cell": dataclasses.asdict(cell), "versions": versions(), "figures": found}
            text = json.dumps(dict(sorted(self.known.items())), indent=1) + "\n"
            draft = self.path.with_suffix(".draft")
            draft.write_text(text)
            draft.replace(self.path)
        return self.known[cell.name]["figures"]

    def versions(self, cells: Sequence[Cell]) -> list[str]:
        """Of what compiled the cells."""
        return sorted({", ".join(f"{k} {v}" for k, v in self.known[cell.name]["versions"].items()) for cell in cells})


def reference(store: Store, topology: str, images: int, parts: Sequence[str]) -> dict[str, Any]:
    """Puts jmoe beside the reference layout on the same mesh; see the top of this file."""
    assert store.experiment.model.moe is not None
    mesh = build(Mesh(), topology_devices(topology), store.experiment.model.moe.num_experts).shape
    rows, cells = [], []
    for part in parts:
        pair = {
            name: Cell(
                part=part,
                recipe="fine-tuning",
                layout=name,
                topology=topology,
                data=mesh["data"],
                expert=mesh["expert"],
                images=images,
                image_size=LARGE,
            )
            for name in COMPARED
        }
        found = {name: store[cell] for name, cell in pair.items()}
        ours, theirs = found["jmoe"], found["reference"]
        ratios = {key: ours[key] / theirs[key] for key in ("seconds", "sent", "bytes", "flops", "peak")}
        ratios["asynchronous"] = ours["seconds"] / found["reference-async"]["seconds"]
        met = ratios["seconds"] <= AT_MOST[part]
        rows.append({"part": part, "figures": found, "ratios": ratios, "at_most": AT_MOST[part], "met": met})
        cells += pair.values()
    return {
        "experiment": EXPERIMENT,
        "topology": topology,
        "mesh": {"data": mesh["data"], "expert": mesh["expert"]},
        "images_per_chip": images,
        "image_size": LARGE,
        "versions": store.versions(cells),
        "rows": rows,
    }


def scaling(store: Store, topologies: Sequence[str], images: int) -> dict[str, Any]:
    """The step on every slice, in each of COLUMNS; efficiency is by the first slice.

    On v5e only slices of at most 16 chips have an asynchronous all-to-all: to compare few chips with many, all wait.
    """
    model = store.experiment.model
    assert model.moe is not None
    assert isinstance(model.moe.layers, str)
    columns: dict[str, Any] = {}
    cells = []
    for name, layout, expert in COLUMNS:
        rows: list[dict[str, Any]] = []
        for topology in topologies:
            mesh = build(Mesh(expert=expert), topology_devices(topology), model.moe.num_experts).shape
            cell = Cell(
                part=model.moe.layers,
                recipe="pre-training",
                layout=layout,
                topology=topology,
                data=mesh["data"],
                expert=mesh["expert"],
                images=images,
                image_size=model.image_size[0],
            )
            found = store[cell]
            first = rows[0]["figures"] if rows else found
            rows.append(
                {
                    "topology": topology,
                    "mesh": {"data": cell.data, "expert": cell.expert},
                    "batch_size": images * cell.data * cell.expert,
                    "efficiency": first["seconds"] / found["seconds"],
                    "figures": found,
                }
            )
            cells.append(cell)
        columns[name] = rows
    last = columns[COLUMNS[0][0]][-1]["efficiency"]
    return {
        "experiment": EXPERIMENT,
        "images_per_chip": images,
        "image_size": model.image_size[0],
        "versions": store.versions(cells),
        "rows": columns,
        "at_least": AT_LEAST,
        "met": last >= AT_LEAST,
    }


HEAD = (
    f"{'':<26}{'bound, ms':>10}{'compiler':>10}{'kernels':>9}{'moved':>8}{'waiting':>9}"
    f"{'sent, MB':>10}{'memory, GB':>12}{'TFLOP':>8}{'peak, GiB':>11}"
)


def _line(name: str, found: Mapping[str, Any]) -> str:
    milliseconds = {key: 1e3 * found[key] for key in ("seconds", "compiler", "kernels", "others", "collectives")}
    return (
        f"{name:<26}{milliseconds['seconds']:>10.2f}{milliseconds['compiler']:>10.2f}{milliseconds['kernels']:>9.2f}"
        f"{milliseconds['others']:>8.2f}{milliseconds['collectives']:>9.2f}{found['sent'] / 1e6:>10.1f}"
        f"{found['bytes'] / 1e9:>12.2f}{found['flops'] / 1e12:>8.3f}{found['peak'] / 2**30:>11.2f}"
    )


def reference_text(table: Mapping[str, Any]) -> str:
    """The table of `reference`."""
    mesh = ",".join(f"{axis}={size}" for axis, size in table["mesh"].items())
    lines = [
        f"{table['experiment']} fine-tuned at {table['image_size']} px, compiled for {table['topology']}, not run: "
        f"{mesh}, {table['images_per_chip']} images per chip",
        *(f"with {line}" for line in table["versions"]),
        "",
        HEAD,
    ]
    for row in table["rows"]:
        what = "sparse layer alone" if row["part"] == "layer" else f"step, {row['part']}"
        lines += [what, *(_line(f"  {LAYOUTS[name].title}", found) for name, found in row["figures"].items())]
        ratios, verdict = row["ratios"], "met" if row["met"] else "MISSED"
        others = ", ".join(
            f"{label} {ratios[key]:.3f}"
            for key, label in (("sent", "sent"), ("bytes", "memory"), ("flops", "FLOPs"), ("peak", "peak"))
        )
        lines.append(f"  ratio {ratios['seconds']:.3f}, wanted at most {row['at_most']}: {verdict}; {others}")
        lines.append(f"  ratio {ratios['asynchronous']:.3f} where the reference layout is asynchronous, too")
    return "\n".join([*lines, "", *LEGEND])


def scaling_text(table: Mapping[str, Any]) -> str:
    """The table of `scaling`."""
    lines = [
        f"A step of {table['experiment']} at {table['image_size']} px, compiled, not run: "
        f"{table['images_per_chip']} images per chip",
        *(f"with {line}" for line in table["versions"]),
        "",
        HEAD,
    ]
    for name, rows in table["rows"].items():
        lines.append(name)
        lines += [_line(f"  {r['topology']} {r['mesh']['data']}x{r['mesh']['expert']}", r["figures"]) for r in rows]
        found = ", ".join(f"{row['efficiency']:.3f} on {row['topology']}" for row in rows[1:])
        wanted = f", wanted at least {table['at_least']}: {'met' if table['met'] else 'MISSED'}"
        lines.append(f"  efficiency {found}{wanted if name == COLUMNS[0][0] else ''}")
    return "\n".join([*lines, "", *LEGEND])


LEGEND = (
    "bound: the least time by what the compiler knows: the sum of what it counts in cycles, Pallas kernels, data moved",
    "(gathers, scatters, sorts), and waiting for other chips. sent: what a chip must send to others. memory: read and",
    "written as the compiler counts it, that on the chip included. peak: of the memory of a chip. asynchronous: with",
    "jmoe.parallel.Exchange.compiler_options: a chip computes what it can while an all-to-all travels.",
)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument(
        "--again",
        choices=(*LAYOUTS, "all"),
        nargs="?",
        const="all",
        help="compile what the results have as well, all of it or that of one layout",
    )
    common.add_argument("--results", type=pathlib.Path, default=RESULTS, help="where figures are kept (%(default)s)")
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = found.add_subparsers(dest="table", required=True)
    one = tables.add_parser("reference", parents=[common], help="jmoe beside the layout of google-research/vmoe")
    one.add_argument("--topology", default="v5e:4x4", help="the slice (%(default)s)")
    one.add_argument("--images", type=int, default=16, help="per chip, a multiple of 8 (%(default)s)")
    one.add_argument("--only", choices=PARTS, action="append", help="a part of the table; may be repeated")
    other = tables.add_parser("scaling", parents=[common], help="few chips beside many")
    other.add_argument(
        "--topologies", nargs="+", default=["v5e:2x4", "v5e:16x16"], help="the smallest first (%(default)s)"
    )
    other.add_argument("--images", type=int, default=16, help="per chip, a multiple of 8 (%(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; 0 if its targets are met, 1 if one is missed, 2 if it cannot be made."""
    args = parser().parse_args(arguments)
    try:
        store = Store(args.results, load_experiment(ROOT / EXPERIMENT), args.again)
        if args.table == "reference":
            table = reference(store, args.topology, args.images, args.only or PARTS)
            met, text = all(row["met"] for row in table["rows"]), reference_text
        else:
            table = scaling(store, args.topologies, args.images)
            met, text = table["met"], scaling_text
    except UserError as error:
        _say(str(error))
        return 2
    print(json.dumps(table, indent=1) if args.json else text(table))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
