"""What Florence-2 is: tasks, coordinates, pictures, prompts, answers, decoding; neither torch nor a server.

Every room may import it; it imports none.
"""
