"""Routing: from what a gate says to a decision, with the losses and metrics that read it. Pure functions of arrays."""

from jmoe.routing.capacity import expert_capacity as expert_capacity
from jmoe.routing.decision import Decision as Decision
from jmoe.routing.decision import Mixing as Mixing
from jmoe.routing.decision import Routing as Routing
from jmoe.routing.expert_choice import ExpertChoice as ExpertChoice
from jmoe.routing.gating import Gating as Gating
from jmoe.routing.gating import add_noise as add_noise
from jmoe.routing.gating import gating as gating
from jmoe.routing.losses import Balance as Balance
from jmoe.routing.losses import Importance as Importance
from jmoe.routing.losses import Load as Load
from jmoe.routing.losses import Loss as Loss
from jmoe.routing.losses import ZLoss as ZLoss
from jmoe.routing.metrics import routing_metrics as routing_metrics
from jmoe.routing.router import Router as Router
from jmoe.routing.router import decide as decide
from jmoe.routing.soft import Soft as Soft
from jmoe.routing.switch import Switch as Switch
from jmoe.routing.top_k import TopK as TopK
from jmoe.routing.transport_router import EntropicPlan as EntropicPlan
from jmoe.routing.transport_router import QuadraticPlan as QuadraticPlan
from jmoe.routing.transport_router import Transport as Transport
