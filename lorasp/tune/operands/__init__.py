"""The tensors of one job and its calls on the kernels, a module per operator; these import Triton."""
