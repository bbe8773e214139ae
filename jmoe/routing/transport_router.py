"""Routing by optimal transport (Liu, Puigcerver and Blondel 2022, arXiv:2209.15466, section 6)."""

import dataclasses
from typing import Literal, get_args

import jax

from jmoe.notation import Array, Float
from jmoe.routing.capacity import expert_capacity
from jmoe.routing.decision import Routing
from jmoe.routing.expert_choice import ExpertChoice
from jmoe.routing.gating import Gating
from jmoe.routing.losses import Loss
from jmoe.routing.top_k import TopK
from jmoe.routing.transport import Choosers, Solver, entropic_plan, quadratic_plan

Weights = Literal["gates", "clean_gates", "plan"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticPlan:
    """A plan with zeros, of the softmax of the logits; see `quadratic_plan`. It carries no gradient.

    Attributes:
      sparse: whether a token has at most K nonzeros where tokens choose, an expert at most C where experts choose, as
        the paper proposes; else the regulariser alone makes zeros (Blondel et al. 2018, arXiv:1710.06276).
      steps: of Adam; 20 as published, too few for the optimum.
      learning_rate: of Adam; 1e-2 as published.
    """

    sparse: bool = True
    steps: int = 20
    learning_rate: float = 1e-2

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"QuadraticPlan wants at least 1 of its steps; it got {self.steps}.")
        if not self.learning_rate > 0:
            raise ValueError(f"QuadraticPlan wants a learning_rate above 0; it got {self.learning_rate}.")

    def __call__(self, gating: Gating, choosers: Choosers, choices: int) -> Float[Array, "G S E"]:
        """The plan; every chooser is to choose so many."""
        return quadratic_plan(
            gating.gates,
            gating.mask,
            choosers=choosers,
            nonzeros=choices if self.sparse else None,
            steps=self.steps,
            learning_rate=self.learning_rate,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropicPlan:
    """A plan without zeros, of the logits; see `entropic_plan`.

    Attributes:
      solver: "sinkhorn" as published, or "newton" for the optimum, as good as the published L-BFGS or better.
      steps: rounds of Sinkhorn's algorithm, or at most so many of Newton's method; 20 as published. The published code
        rounds it down to tens. 0, to which it so comes below 10, leaves exp(logits), which balances nothing.
    """

    solver: Solver = "sinkhorn"
    steps: int = 20

    def __post_init__(self):
        if self.solver not in get_args(Solver):
            raise ValueError(f"EntropicPlan wants solver 'sinkhorn' or 'newton'; it got {self.solver!r}.")
        if self.steps < (self.solver == "newton"):
            least = "0 steps" if self.solver == "sinkhorn" else "1 of Newton's steps"
            raise ValueError(f"EntropicPlan wants at least {least}; it got {self.steps}.")

    def __call__(self, gating: Gating, choosers: Choosers, choices: int) -> Float[Array, "G S E"]:
        """The plan, which is the same whoever chooses."""
        del choosers, choices
        return entropic_plan(gating.noisy_logits, gating.mask, steps=self.steps, solver=self.solver)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport:
    """Tokens or experts choose by a plan that gives every expert the same amount, instead of by the gates.

    Where the plan is balanced, choices by its largest entries nearly are: few tokens are dropped, without any auxiliary
    loss.

    Attributes:
      choice: who chooses how many, and what happens when an expert is full: a TopK or an ExpertChoice, which is given
        the plan for gates. Its noise_std is that of this router; the paper has no noise.
      plan: which plan. An entry of 0 may be chosen too, if there is nothing better.
      weights: where combine weights are read: "gates", the softmax over experts of what was routed on, as published;
        "clean_gates", that of the logits without noise, as the published code has it where tokens choose (noise then
        decides, and is not in the weights); or "plan", of which only an entropic one teaches the gate anything.
    """

    choice: TopK | ExpertChoice = TopK(noise_std=0.0)  # noqa: RUF009 (it is frozen)
    plan: QuadraticPlan | EntropicPlan = QuadraticPlan()
    weights: Weights = "gates"
    takes = "gating"

    def __post_init__(self):
        if self.weights not in get_args(Weights):
            raise ValueError(f"Transport wants weights 'gates', 'clean_gates' or 'plan'; it got {self.weights!r}.")

    @property
    def noise_std(self) -> float:
        """Noise on the logits in training, in units of 1 / E."""
        return self.choice.noise_std

    @property
    def losses(self) -> tuple[Loss, ...]:
        """None are needed; Importance and Load may be added where tokens choose."""
        return ()

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a token is independent of the rest of its group."""
        return False

    def transport(self, gating: Gating) -> Float[Array, "G S E"]:
        """The plan by which is chosen; padding has none."""
        _, S, E = gating.logits.shape
        if isinstance(self.choice, TopK):
            return self.plan(gating, "tokens", self.choice.k)
        C = expert_capacity(S, E, self.choice.capacity_factor, self.choice.rounding, self.choice.multiple)
        return self.plan(gating, "experts", C)

    def __call__(self, gating: Gating) -> Routing:
        """Routes groups of tokens.

        Args:
          gating: what the gate says, with the mask of real tokens.

        Returns:
          the Routing of the choice.

        Raises:
          ValueError: as the choice raises it.
        """
        plan = self.transport(gating)
        weights = {"gates": gating.gates, "clean_gates": gating.clean_gates, "plan": plan}[self.weights]
        return self.choice(jax.lax.stop_gradient(plan), mask=gating.mask, weights=weights)
