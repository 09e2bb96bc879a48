from florence2.backend.vision_encoder import TritonPythonModel  # noqa: F401
