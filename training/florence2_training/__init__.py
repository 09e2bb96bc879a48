"""A recipe becomes a run, and a run a merged checkpoint.

The command and the demo import it; it imports export, evaluation and data.
"""
