"""What a sparse layer asks of several devices: the exchange of tokens, which is passed to it.

A layer names no device and no mesh. It says which of its steps concern a group alone, and when tokens go to their
experts and come back; `jmoe.parallel.Exchange` does that on a mesh, and `ONE_DEVICE`, here, does nothing of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jmoe.notation import Array, Float, Int, PRNGKeyArray, Shaped

EXCHANGED = "exchanged"  # what has crossed the network has this name, so that remat keeps it and sends nothing twice


@runtime_checkable
class Carrier(Protocol):
    """The exchange as seen by one device, inside `Exchange.with_experts`."""

    @property
    def expert_parts(self) -> int:
        """In how many parts the experts are divided."""
        ...

    def slots_to_experts(self, slots: Float[Array, "E N D"]) -> Float[Array, "e n D"]:
        """Sends the slots of all experts away and returns those of all devices for the experts here."""
        ...

    def slots_to_tokens(self, outputs: Float[Array, "e n D"]) -> Float[Array, "E N D"]:
        """Undoes `slots_to_experts`."""
        ...

    def rows_to_experts(
        self, rows: Float[Array, "N D"], group_sizes: Int[Array, " E"], limit: int
    ) -> tuple[Float[Array, "M D"], Int[Array, " e"], Callable[[Float[Array, "M D"]], Float[Array, "N D"]]]:
        """Sends rows that are sorted by expert to the devices of their experts.

        Args:
          rows: [N, D]; those past sum(group_sizes) stay.
          group_sizes: [E], the rows of each expert.
          limit: the most rows that go from one device to another.

        Returns:
          the rows of all devices for the experts here, sorted by expert; how many each has; and what undoes it.
        """
        ...

    def key_of_part(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """Of devices that share the hidden units, each its own."""
        ...

    def to_parts(self, rows: Float[Array, "..."]) -> Float[Array, "..."]:
        """Gives the same rows to all devices that share the hidden units; must come before the experts."""
        ...

    def sum_parts(self, outputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Adds up what the devices made of their parts of the hidden units."""
        ...


@runtime_checkable
class Exchange(Protocol):
    """See the module; implemented by `ONE_DEVICE` and `jmoe.parallel.Exchange`."""

    @property
    def parts(self) -> int:
        """In how many parts images and groups are divided."""
        ...

    @property
    def expert_parts(self) -> int:
        """In how many parts the experts are divided."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether devices compute while tokens travel."""
        ...

    @property
    def compiler_options(self) -> dict[str, str]:
        """Options for `jax.jit` by which they do."""
        ...

    def split(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """Says that an axis (images, groups) is divided among devices."""
        ...

    def per_group(
        self,
        function: Callable[..., Any],
        *trees: Any,
        in_axes: int | tuple[int, ...] = 0,
        out_axes: int = 0,
        kernels: bool = False,
    ) -> Any:
        """Calls function(*trees) on every device with its groups.

        Args:
          function: of the groups of one device.
          *trees: arrays that have the groups along an axis.
          in_axes: that axis, of all leaves, or for each of trees.
          out_axes: that axis of the results.
          kernels: whether function calls ops of `kernels_pallas`.
        """
        ...

    def to_experts(self, slots: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """Brings slots, which lie with their tokens, to the devices of their experts."""
        ...

    def to_tokens(self, outputs: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """Undoes `to_experts`."""
        ...

    def with_experts(
        self,
        function: Callable[..., Any],
        parameters: Any,
        axes: Mapping[str, str],
        *trees: Any,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """Calls function(parameters, carrier, *trees, key) on every device with its experts and its groups.

        Args:
          function: returns arrays with groups as axis 0.
          parameters: of all experts.
          axes: for the last part of each parameter's name the letters of its axes, such as "EDF": those with E are
            divided among devices by expert, those with F by hidden unit. What has no F is given to one part of the
            hidden units, and is zero for the others.
          *trees: leaves with groups as axis 0.
          key: randomness of the experts; every device gets its own.
        """
        ...


class _OneDevice:
    """Everything is here already. It is its own carrier."""

    parts = expert_parts = 1
    overlaps = False

    @property
    def compiler_options(self) -> dict[str, str]:
        return {}

    def split(self, x: Any, axis: int = 0) -> Any:
        return x

    def per_group(self, function: Callable[..., Any], *trees: Any, **options: Any) -> Any:
        del options
        return function(*trees)

    def to_experts(self, slots: Any) -> Any:
        return slots

    def to_tokens(self, outputs: Any) -> Any:
        return outputs

    def with_experts(
        self, function: Callable[..., Any], parameters: Any, axes: Mapping[str, str], *trees: Any, key: Any = None
    ) -> Any:
        del axes
        return function(parameters, self, *trees, key)

    def slots_to_experts(self, slots: Any) -> Any:
        return slots

    def slots_to_tokens(self, outputs: Any) -> Any:
        return outputs

    def rows_to_experts(self, rows: Any, group_sizes: Any, limit: int) -> Any:
        del limit
        return rows, group_sizes, lambda outputs: outputs

    def key_of_part(self, key: Any) -> Any:
        return key

    def to_parts(self, rows: Any) -> Any:
        return rows

    def sum_parts(self, outputs: Any) -> Any:
        return outputs


ONE_DEVICE: Exchange = _OneDevice()
