"""Plain PyTorch forward and backward of every operator: the definition of correct."""
