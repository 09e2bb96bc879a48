"""What Triton's Python backend runs: a module per model, and what they all need of its requests.

A model.py in a repository is one import of `florence2.backend.MODEL`, of a name that never changes: repositories of
every age run the code that is installed beside the server. Imported there only; tests stand in for
`triton_python_backend_utils`.
"""
