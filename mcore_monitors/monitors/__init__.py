"""Monitors: what to look at and when."""
