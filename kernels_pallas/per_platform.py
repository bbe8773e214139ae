"""One computation with an implementation for each platform, chosen when a program is lowered.

Only then is the platform known for certain: that of this machine, or of another for which a program is compiled ahead
of time. It also means that a program for CPU neither imports nor traces a kernel.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from kernels_pallas import compat, target

logger = logging.getLogger("kernels_pallas")
_said: set[str] = set()

PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}  # JAX's name of a platform: ours of its kernels
NAMES = ("pallas", "xla", "reference")  # what `implementation` may be, beside None and those for tests
INTERPRETED = {"interpret-tpu": "tpu", "interpret-gpu": "gpu"}
OLD_TPUS = ("TPU v2", "TPU v3")
OLDEST_CUDA = 8.0  # compute capability


def check_name(op: str, implementation: str | None) -> None:
    """Raises NotImplementedError unless implementation is None or a name that exists."""
    if implementation is not None and implementation not in (*NAMES, *INTERPRETED):
        raise NotImplementedError(
            f"{op} has no implementation {implementation!r}; use one of {', '.join(map(repr, NAMES))}, or None."
        )


class PerPlatform:
    """A function of arrays, called with an `implementation`.

    None means the kernel where the platform is one of `preferred` and the kernel can take the arguments, and XLA
    elsewhere; which of them it was is logged once. A named one runs, or is an error that says why it cannot.
    """

    def __init__(
        self,
        name: str,
        *,
        xla: Callable[..., Sequence[jax.Array]],
        kernels: Mapping[str, str],
        preferred: Collection[str],
        title: str | None = None,
    ):
        """Registers it with JAX.

        Args:
          name: of the function, in the modules of its kernels and in the compiled program.
          xla: (*arrays, **options) -> arrays, for every platform.
          kernels: for "tpu" and "gpu" the module that has it as a function, with one argument more, `interpret`; and
            `refusal(*arrays, **options)`, which returns why the kernel cannot take them, or None.
          preferred: those of kernels that are taken where no implementation is named.
          title: for messages; name if None.
        """
        self.name, self.title, self.xla = name, title or name, xla
        self.kernels, self.preferred = dict(kernels), frozenset(preferred)
        self._primitive = Primitive(name)
        self._primitive.multiple_results = True
        self._primitive.def_abstract_eval(self._abstract)
        mlir.register_lowering(self._primitive, functools.partial(self._lower, None))
        for platform in PLATFORMS:
            mlir.register_lowering(self._primitive, functools.partial(self._lower, platform), platform=platform)
        batching.primitive_batchers[self._primitive] = self._batch

        def bind(*arrays, **parameters):
            return self._primitive.bind(*arrays, **parameters)

        bind.__name__ = name  # which profiles show
        # Under jit, so that calls of one shape are traced and lowered once for a program.
        self._bind = jax.jit(bind, static_argnames=("implementation", "options", "batch_axes"))

    def __call__(self, *arrays: jax.Array, implementation: str | None = None, **options: Any) -> tuple[jax.Array, ...]:
        """Runs it; options are hashable."""
        if implementation == "xla":
            return tuple(self.xla(*arrays, **options))
        if platform := INTERPRETED.get(implementation or ""):
            if reason := self.refusal(platform, *arrays, **options):
                raise NotImplementedError(f"{self.title}: {reason}")
            return tuple(self._kernel(platform)(*arrays, interpret=True, **options))
        if implementation == "pallas":
            reasons = [self.refusal(platform, *arrays, **options) for platform in self.kernels]
            if all(reasons):
                raise NotImplementedError(f"{self.title} cannot run as 'pallas': {' '.join(map(str, reasons))}")
        frozen = tuple(sorted(options.items()))
        return tuple(self._bind(*arrays, implementation=implementation, options=frozen, batch_axes=0))

    def unavailable(self, platform: str) -> str | None:
        """Why there can be no "pallas" on a platform of JAX, whatever the arguments; None if there can."""
        kernel = PLATFORMS.get(platform)
        return self._obstacle(kernel) if kernel else "Pallas kernels are for TPU and CUDA devices."

    def available(self, platform: str) -> tuple[str, ...]:
        """The implementations on a platform of JAX ("cpu", "tpu", "cuda", ...), the default first."""
        kernel = PLATFORMS.get(platform)
        if kernel not in self.kernels:
            return ("xla",)
        return ("pallas", "xla") if kernel in self.preferred else ("xla", "pallas")

    def refusal(self, platform: str, *arrays: Any, **options: Any) -> str | None:
        """Why the kernel for "tpu" or "gpu" cannot take arrays of these shapes and dtypes; None if it can."""
        if reason := self._obstacle(platform):
            return reason
        return importlib.import_module(self.kernels[platform]).refusal(*arrays, **options)

    def _obstacle(self, platform: str) -> str | None:
        if platform not in self.kernels:
            return f"There is no kernel for {platform}."
        if reason := device_refusal(platform):
            return reason
        try:
            importlib.import_module(self.kernels[platform])
        except ImportError as error:
            return f"The kernel for {platform} cannot be imported: {error}."
        return None

    def _kernel(self, platform: str) -> Callable[..., Sequence[jax.Array]]:
        return getattr(importlib.import_module(self.kernels[platform]), self.name)

    def _abstract(self, *avals: Any, options: tuple[tuple[str, Any], ...], batch_axes: int, **_: Any):
        inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        results = jax.eval_shape(self._mapped(functools.partial(self.xla, **dict(options)), batch_axes), *inputs)
        return [compat.like_inputs(result, avals) for result in results]

    def _lower(
        self,
        platform: str | None,
        ctx: Any,
        *values: Any,
        implementation: str | None,
        options: tuple[tuple[str, Any], ...],
        batch_axes: int,
    ):
        one = [jax.ShapeDtypeStruct(aval.shape[batch_axes:], aval.dtype) for aval in ctx.avals_in]
        kernel = self._choose(platform, one, implementation, dict(options))
        if kernel is None:
            function = self._mapped(functools.partial(self.xla, **dict(options)), batch_axes)
        else:
            function = functools.partial(kernel, interpret=False, **dict(options))
            for _ in range(batch_axes):  # a kernel is called for one after the other
                function = functools.partial(_map, function)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *values)

    def _choose(self, platform: str | None, arrays: Sequence[Any], implementation: str | None, options: dict[str, Any]):
        """The kernel to take, or None for XLA."""
        kernel = PLATFORMS.get(platform or "")
        wanted = implementation == "pallas" or kernel in self.preferred
        reason = "Pallas kernels are for TPU and CUDA devices."
        if wanted and kernel:
            reason = self.refusal(kernel, *arrays, **options)
            if reason is None:
                _say_once(f"{self.title} runs as 'pallas' on {kernel}.")
                return self._kernel(kernel)
        if implementation == "pallas":
            raise NotImplementedError(f"{self.title} cannot run as 'pallas' here: {reason} Use 'xla', or None.")
        _say_once(f"{self.title} runs as 'xla'{f' on {kernel}: {reason}' if wanted and kernel else ' here.'}")
        return None

    def _batch(self, arrays: Sequence[Any], axes: Sequence[Any], *, batch_axes: int, **parameters: Any):
        size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
        mapped = [
            jax.numpy.broadcast_to(a, (size, *a.shape)) if axis is None else jax.numpy.moveaxis(a, axis, 0)
            for a, axis in zip(arrays, axes, strict=True)
        ]
        results = self._primitive.bind(*mapped, batch_axes=batch_axes + 1, **parameters)
        return results, [0] * len(results)

    def _mapped(self, function: Callable[..., Any], batch_axes: int) -> Callable[..., Any]:
        for _ in range(batch_axes):
            function = jax.vmap(function)
        return function


def device_refusal(platform: str) -> str | None:
    """Why the device that is compiled for cannot run kernels for "tpu" or "gpu"; None if it can, or is not known."""
    if platform == "tpu":
        kind = target.device_kind("tpu")
        if kind is not None and kind.startswith(OLD_TPUS):
            return f"The kernels are for TPU v4 and newer, and this is a {kind}."
        return None
    capability = target.compute_capability()
    if capability is not None and capability < OLDEST_CUDA:
        return f"The kernels want a GPU of compute capability {OLDEST_CUDA} or more; this one has {capability}."
    return None


def _map(function: Callable[..., Any], *arrays: Any) -> Any:
    return jax.lax.map(lambda one: function(*one), arrays)


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        logger.info(sentence)
