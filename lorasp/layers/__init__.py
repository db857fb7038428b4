"""Adapted layers: LoRALinear and its kin over quantised weights, layers that share an input, MLPs that recompute."""
