"""The model that parameters belong to: which one their names and shapes imply, and whether they fit a given one."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

from jmoe.convert.names import first_of, flatten, listed
from jmoe.convert.positions import square_grid
from jmoe.errors import UserError
from jmoe.models.vit import Positions, VisionTransformer, ViTConfig
from jmoe.nn import MoEConfig
from jmoe.routing import Soft, TopK

Shape = tuple[int, ...]
IMAGE_SIZE = 224  # of the published pre-trained models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inferred:
    """What parameters say about their model.

    Attributes:
      config: the model.
      assumed: dotted options of the model that the parameters do not decide, with the published values that were taken.
    """

    config: ViTConfig
    assumed: dict[str, Any]


def infer(shapes: Mapping[str, Shape], origin: object) -> Inferred:
    """Returns the vision transformer, dense or sparse, whose parameters have these names and shapes.

    What shapes do not tell is as published: two experts per token (one in an ensemble) with capacity factor 1.05, in
    groups of 8 whole images; a soft router's groups are single images. But tokens are not rounded to bfloat16 on their
    way to the experts, as published programs do (`MoEConfig.exchange_dtype`). Without a class token or an attention
    pool the mean of the tokens is classified; without learned positions they are fixed sincos2d ones, of images of 224
    pixels.

    Args:
      shapes: by our names.
      origin: the file they are from, for the sentence of an error.

    Raises:
      UserError: parameters are missing or left over, or their shapes do not fit together; the message lists them.
    """
    read = _Shapes(shapes, origin)
    assumed: dict[str, Any] = {}
    p, _, channels, D = read("patches/kernel", 4)
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks/(\d+)/", name))}
    _, num_heads, _ = read("blocks/0/attention/query/kernel", 3)
    sparse = tuple(sorted(i for i in blocks if any(name.startswith(f"blocks/{i}/moe/") for name in shapes)))
    dense = sorted(blocks.difference(sparse))

    if "cls" in shapes:
        pool = "token"
    elif "pool/probe" in shapes:
        pool = "map"
    else:
        pool = assumed["pool"] = "mean"
    positions: Positions = "learned"
    if "positions" in shapes:
        _, N, _ = read("positions", 3)
        try:
            side, has_token = square_grid(N)
        except UserError as error:
            raise UserError(f"{origin} is not of square images: {error}") from None
        if has_token != (pool == "token"):
            raise UserError(f"{origin} has {N} positions, which are no square grid with pool={pool!r}.")
    else:
        positions = assumed["positions"] = "sincos2d"
        side = max(1, round(IMAGE_SIZE / p))
        assumed["image_size"] = (side * p, side * p)

    if dense:
        _, hidden_dim = read(f"blocks/{dense[0]}/mlp/w_in", 2)
    elif pool == "map":
        _, hidden_dim = read("pool/mlp/w_in", 2)
    else:
        _, _, hidden_dim = read("blocks/0/moe/experts/w_in", 3)
    moe = _infer_moe(read, sparse, hidden_dim, assumed) if sparse else None
    representation_dim = read("pre_logits/kernel", 2)[1] if "pre_logits/kernel" in shapes else None
    num_classes = read("head/kernel", 2)[1] if "head/kernel" in shapes else None
    try:
        config = ViTConfig(
            patch_size=p,
            width=D,
            depth=len(blocks),
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            num_classes=num_classes,
            image_size=(side * p, side * p),
            channels=channels,
            pool=pool,
            positions=positions,
            representation_dim=representation_dim,
            qk_norm="blocks/0/attention/query_ln/scale" in shapes,
            moe=moe,
        )
    except ValueError as error:
        raise UserError(f"{origin} implies a model that cannot be: {error}") from None
    check(shapes, config, origin)
    return Inferred(config=config, assumed=assumed)


class _Shapes:
    """Shapes by name, each of which is asked for with its number of axes."""

    def __init__(self, shapes: Mapping[str, Shape], origin: object):
        self.shapes = shapes
        self.origin = origin

    def __call__(self, name: str, axes: int) -> Shape:
        if name not in self.shapes:
            raise UserError(f"{self.origin} has no {name!r}, without which the model cannot be told.")
        shape = self.shapes[name]
        if len(shape) != axes:
            raise UserError(f"{self.origin} has {name!r} of shape {shape}, where one of {axes} axes was expected.")
        return shape


def _infer_moe(read: _Shapes, sparse: tuple[int, ...], hidden_dim: int, assumed: dict[str, Any]) -> MoEConfig:
    """The sparse blocks, as the first of them has it."""
    experts, _, F = read(f"blocks/{sparse[0]}/moe/experts/w_in", 3)
    gate = f"blocks/{sparse[0]}/moe/gate"
    router: Any  # a Soft takes logits where the protocol says gates
    members = 1
    if f"{gate}/mu" in read.shapes:
        router, images_per_group = Soft(slots_per_expert=max(1, read(f"{gate}/mu", 3)[2])), 1
    else:
        if len(read.shapes.get(f"{gate}/kernel", ())) == 3:  # [D, M, E / M]
            members = max(1, read(f"{gate}/kernel", 3)[1])
        else:
            read(f"{gate}/kernel", 2)
        k = 1 if members > 1 else min(2, experts)
        router, images_per_group = TopK(k=k), 8
        assumed["moe.router"] = router
    assumed["moe.images_per_group"] = images_per_group
    assumed["moe.exchange_dtype"] = None
    try:
        return MoEConfig(
            num_experts=experts,
            hidden_dim=F if hidden_dim != F else None,
            router=router,
            layers=sparse,
            images_per_group=images_per_group,
            members=members,
        )
    except ValueError as error:
        raise UserError(f"{read.origin} implies a model that cannot be: {error}") from None


def parameter_shapes(config: ViTConfig) -> dict[str, Shape]:
    """Returns the shape of every parameter of the model by our names; nothing is allocated."""
    model = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    return {name: tuple(leaf.shape) for name, leaf in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}


def check(shapes: Mapping[str, Shape], config: ViTConfig, origin: object) -> None:
    """Raises UserError, naming them, unless the names and shapes are those of the model's parameters."""
    wanted = parameter_shapes(config)
    different = {name: shape for name, shape in wanted.items() if name in shapes and shapes[name] != shape}
    for name in different:
        if "/moe/experts/" in name and shapes[name][1:] == wanted[name][1:]:
            E = shapes[name][0] if shapes[name] else 0
            raise UserError(
                f"{origin} has {E} experts at {name!r} {shapes[name]}; the model has num_experts={wanted[name][0]}."
            )
    problems = first_of(
        [f"{name!r} is {shapes[name]} there and {shape} in the model" for name, shape in different.items()]
    )
    if missing := [name for name in wanted if name not in shapes]:
        problems.append(f"it lacks {listed(missing)}")
    if unmatched := [name for name in shapes if name not in wanted]:
        problems.append(f"the model has no {listed(unmatched)}")
    if problems:
        raise UserError(f"{origin} does not fit the model: {'; '.join(problems)}.")


def count(shapes: Mapping[str, Shape]) -> int:
    """Returns the number of parameters in all."""
    return sum(math.prod(shape) for shape in shapes.values())
