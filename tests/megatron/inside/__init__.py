"""Tests on Megatron's own classes, for a process of their own.

The CPU stand-in has to be installed before Megatron is imported, here, and can't be taken back, so
pytest doesn't collect this folder; ``tests/megatron/test_inside.py`` runs each file in a fresh
process.
"""

from mcore_monitors import cpu

cpu.install()
