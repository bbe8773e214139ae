"""Layers: thin NNX modules that hold parameters and call the pure functions."""

from jmoe.nn.attention import AttentionPool as AttentionPool
from jmoe.nn.block import Block as Block
from jmoe.nn.gate import LinearGate as LinearGate
from jmoe.nn.gate import SlotGate as SlotGate
from jmoe.nn.mlp import ExpertMlp as ExpertMlp
from jmoe.nn.mlp import Mlp as Mlp
from jmoe.nn.moe import MoEConfig as MoEConfig
from jmoe.nn.moe import MoEMlp as MoEMlp
from jmoe.nn.moe import MoEOutput as MoEOutput
from jmoe.nn.patches import PatchEmbedding as PatchEmbedding
