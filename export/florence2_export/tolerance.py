"""How far a graph may be from the checkpoint."""

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.2}
"""Largest difference allowed in a graph's output, relative to the output's largest value, by precision."""
