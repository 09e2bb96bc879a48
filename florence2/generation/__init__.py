"""Beam search as transformers defines it, for requests that come and go.

Backend, export and evaluation import it; it imports florence2.
"""
