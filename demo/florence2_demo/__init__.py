"""How the checkpoint in demo/checkpoint was made. In no wheel.

Nothing imports it; it imports training, export, evaluation and datasets.
"""
