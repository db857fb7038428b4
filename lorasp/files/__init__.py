"""Adapter files in PEFT's format."""
