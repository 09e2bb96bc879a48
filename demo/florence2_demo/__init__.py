"""How the checkpoint in demo/checkpoint was made. In no wheel.

No room imports it; it imports training, export, evaluation and data.
"""
