"""What beam_search's config.pbtxt says in each profile, where that differs from the one for a CPU.

The vision encoder's differ in more than values, most in their backend, so they are files, in
model_repository/vision_encoder/configs.
"""

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

_GPU = {
    "rows": "96",
    "requests": "32",
    "cache_block": "64",
    "max_waiting": "256",
    "encoder_batch": "8",
    "cuda_graphs": "64",
}
_CUDA = _GPU | {"execution_provider": "cuda"}
_TENSORRT = _GPU | {"execution_provider": "tensorrt", "tensorrt_cache": "/var/cache/florence2-triton"}

BEAM_SEARCH = {"cuda": _CUDA, "cuda-python": _CUDA, "tensorrt": _TENSORRT, "tensorrt-ep": _TENSORRT}
"""Parameters, by profile; all of them run on GPU 0."""
COMMENTS = """\
# Where ONNX Runtime keeps the engine that TensorRT builds for the encoder at the first start.
parameters { key: "tensorrt_cache" value { string_value: "" } }
"""
"""Of parameters that the config for a CPU has not, as in a config."""


def on_gpu(config: ModelConfig, parameters: dict[str, str]) -> None:
    """In place."""
    (group,) = config.instance_group
    group.kind = ModelInstanceGroup.KIND_GPU
    group.gpus.append(0)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
