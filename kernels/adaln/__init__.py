"""The adaLN family: LayerNorm (or RMS norm) with modulation, and the gated residual in front of it."""
