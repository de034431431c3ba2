"""Attention without a causal mask."""
