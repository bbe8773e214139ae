"""jmoe: sparse mixture-of-experts layers for vision, in JAX and Flax."""

from jmoe import linen as linen
from jmoe import models as models
from jmoe._version import __version__ as __version__
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
