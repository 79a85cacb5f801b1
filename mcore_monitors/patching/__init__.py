"""Puts a few call sites into an installed host, and takes them out again.

Megatron-core and DeepSpeed call nobody once a step, so their training loops need a handful of
added lines (``docs/patches.md`` lists them and says why each is safe). The lines are kept as
unified diffs per release; a manifest holds the digest of every file before and after, and those
digests decide everything: a file is as released, as patched, or not ours to touch. Applying twice
is harmless, reverting restores the released bytes, and whatever isn't recognised is refused with
the reason.
"""
