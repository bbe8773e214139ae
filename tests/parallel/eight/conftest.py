"""Collects nothing where there are not eight devices."""

import jax

collect_ignore_glob = [] if len(jax.devices()) == 8 else ["test_*.py"]
