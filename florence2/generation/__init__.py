"""Beam search as transformers defines it, for requests that come and go.

Backend, export, evaluation and release import it; it imports florence2.
"""
