"""Bias and GELU in one pass."""
