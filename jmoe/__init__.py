"""jmoe: sparse mixture-of-experts layers for vision, in JAX and Flax."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from jmoe._version import __version__ as __version__

if TYPE_CHECKING:
    from jmoe import convert as convert
    from jmoe import linen as linen
    from jmoe import models as models
    from jmoe import parallel as parallel
    from jmoe.dispatch import combine as combine
    from jmoe.dispatch import dispatch as dispatch
    from jmoe.nn import MoEConfig as MoEConfig
    from jmoe.nn import MoEMlp as MoEMlp
    from jmoe.nn import MoEOutput as MoEOutput
    from jmoe.routing import Balance as Balance
    from jmoe.routing import EntropicPlan as EntropicPlan
    from jmoe.routing import ExpertChoice as ExpertChoice
    from jmoe.routing import Importance as Importance
    from jmoe.routing import Load as Load
    from jmoe.routing import Mixing as Mixing
    from jmoe.routing import QuadraticPlan as QuadraticPlan
    from jmoe.routing import Routing as Routing
    from jmoe.routing import Soft as Soft
    from jmoe.routing import Switch as Switch
    from jmoe.routing import TopK as TopK
    from jmoe.routing import Transport as Transport
    from jmoe.routing import ZLoss as ZLoss

__all__ = [
    "Balance",
    "EntropicPlan",
    "ExpertChoice",
    "Importance",
    "Load",
    "Mixing",
    "MoEConfig",
    "MoEMlp",
    "MoEOutput",
    "QuadraticPlan",
    "Routing",
    "Soft",
    "Switch",
    "TopK",
    "Transport",
    "ZLoss",
    "__version__",
    "combine",
    "convert",
    "dispatch",
    "linen",
    "models",
    "parallel",
]

_HOME = {  # the others are in jmoe.routing
    "convert": "jmoe",
    "linen": "jmoe",
    "models": "jmoe",
    "parallel": "jmoe",
    "combine": "jmoe.dispatch",
    "dispatch": "jmoe.dispatch",
    "MoEConfig": "jmoe.nn",
    "MoEMlp": "jmoe.nn",
    "MoEOutput": "jmoe.nn",
}


class _Package(types.ModuleType):
    """Imports each name when it is first used, so that `jmoe --help` does not wait for JAX."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'jmoe' has no attribute {name!r}")
        home = _HOME.get(name, "jmoe.routing")
        if home == "jmoe":
            return importlib.import_module(f"jmoe.{name}")
        value = getattr(importlib.import_module(home), name)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every submodule in its package; jmoe.dispatch, in public, is the function.
        if not (name == "dispatch" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package
