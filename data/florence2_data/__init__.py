"""What people have becomes one record; it is checked and converted.

The command, release, training, evaluation and the demo import it; it imports florence2.
"""
