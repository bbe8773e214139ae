"""Tests that need eight devices; `tests/parallel/test_eight.py` starts each file in a process that has them."""
