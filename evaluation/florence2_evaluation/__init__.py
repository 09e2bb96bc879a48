"""Questions to a checkpoint, an export or a server; scores and reports of the answers.

The command, release, training and the demo import it; it imports data and the client, and export and torch in
`torch_model` alone.
"""
