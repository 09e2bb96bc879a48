from florence2.backend.postprocess import TritonPythonModel  # noqa: F401
