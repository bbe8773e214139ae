"""What a training run would need of a TPU slice, from compiling its real step for it, on a machine without TPUs."""

from jmoe.plan.compiling import check as check
from jmoe.plan.compiling import plan as plan
from jmoe.plan.result import Memory as Memory
from jmoe.plan.result import Plan as Plan
from jmoe.plan.sweeping import Sweep as Sweep
from jmoe.plan.sweeping import sweep as sweep
