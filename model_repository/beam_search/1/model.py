from florence2.backend.beam_search import TritonPythonModel  # noqa: F401
