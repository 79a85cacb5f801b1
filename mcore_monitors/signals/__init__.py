"""Signals: the formulas, tensors in and tensors out, free of ranks, steps, hosts and logs."""
