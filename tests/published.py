"""Published networks, from the table in tests/goldens/published_models.json."""

import dataclasses
import json
import pathlib
import re

import jmoe
from jmoe.models.vit import variant

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "goldens" / "published_models.json").read_text())


def vmoe_config(row, router=None):
    """Ours of a published network with 32 experts."""
    size = re.search(r"(\w+)(/|$)", row["name"])[1]
    layers = re.search(r"Last-\d", row["name"])
    moe = jmoe.MoEConfig(
        num_experts=32, layers=layers[0].lower() if layers else "every-2", router=router or jmoe.TopK()
    )
    return variant(f"{size}/{row['patch']}", num_classes=num_classes(row), moe=moe if row["moe"] else None)


def num_classes(row):
    """Of the data set; the 15B model was trained on its second version."""
    return 29_593 if row["name"] == "V-MoE-15B" else 18_291


def soft_config(row):
    """Ours of a published network of the Soft MoE paper: the last half of its blocks is sparse."""
    name, experts = re.fullmatch(r"(?:ViT|Soft MoE) (\S+)(?: (\d+)E)?", row["name"]).groups()
    config = variant(name, family="softmoe", num_classes=29_593)
    if experts is None:
        return config
    layers = tuple(range(config.depth // 2, config.depth))
    moe = jmoe.MoEConfig(num_experts=int(experts), router=jmoe.Soft(), layers=layers, images_per_group=1)
    return dataclasses.replace(config, moe=moe)
