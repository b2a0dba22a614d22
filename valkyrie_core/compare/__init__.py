"""Comparing designs: which one is better, on what evidence, at which cost."""
