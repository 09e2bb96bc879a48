from florence2.backend.preprocess import TritonPythonModel  # noqa: F401
