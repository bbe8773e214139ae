"""jmoe: sparse mixture-of-experts layers for vision, in JAX and Flax."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from jmoe._version import __version__ as __version__

if TYPE_CHECKING:
    from jmoe import linen as linen
    from jmoe import models as models
    from jmoe.dispatch import combine as combine
    from jmoe.dispatch import dispatch as dispatch
    from jmoe.nn import MoEConfig as MoEConfig
    from jmoe.nn import MoEMlp as MoEMlp
    from jmoe.nn import MoEOutput as MoEOutput
    from jmoe.routing import Balance as Balance
    from jmoe.routing import ExpertChoice as ExpertChoice
    from jmoe.routing import Importance as Importance
    from jmoe.routing import Load as Load
    from jmoe.routing import Mixing as Mixing
    from jmoe.routing import Routing as Routing
    from jmoe.routing import Soft as Soft
    from jmoe.routing import Switch as Switch
    from jmoe.routing import TopK as TopK
    from jmoe.routing import ZLoss as ZLoss

_HOME = {
    **dict.fromkeys(("combine", "dispatch"), "jmoe.dispatch"),
    **dict.fromkeys(("MoEConfig", "MoEMlp", "MoEOutput"), "jmoe.nn"),
    **dict.fromkeys(
        ("Balance", "ExpertChoice", "Importance", "Load", "Mixing", "Routing", "Soft", "Switch", "TopK", "ZLoss"),
        "jmoe.routing",
    ),
}
__all__ = ["__version__", "linen", "models", *_HOME]


class _Package(types.ModuleType):
    """Imports each name when it is first used, so that `jmoe --help` does not wait for JAX."""

    def __getattr__(self, name: str) -> Any:
        if name in ("linen", "models"):
            return importlib.import_module(f"jmoe.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'jmoe' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):  # jmoe.dispatch is the function
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package
