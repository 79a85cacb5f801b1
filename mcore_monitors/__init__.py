"""Monitors for Megatron-core and DeepSpeed that see an instability in the module where it starts.

Importing this package is light: no torch, no host. See ``README.md`` for how to turn it on.
"""

__version__ = "0.1.0"
