"""Whole models: put adapters in, switch, merge and take them out, find what reads one input, compare processes."""
