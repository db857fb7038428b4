"""Operators: schema, fake implementation and autograd; bound to their backends in registry.py."""
