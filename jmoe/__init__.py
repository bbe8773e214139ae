"""jmoe: sparse mixture-of-experts layers for vision, in JAX and Flax."""

from jmoe._version import __version__ as __version__
