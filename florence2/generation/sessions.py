"""ONNX Runtime sessions on the device that a model's config.pbtxt names."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from florence2.generation.caches import in_blocks
from florence2.manifest import Sizes

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Options = Mapping[str, str]

CUDA: Options = {
    # TF32 would round fp32 to 10 bits.
    "use_tf32": "0",
    # The default tries every algorithm whenever a batch has another size.
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}
PROVIDERS: dict[str, tuple[tuple[str, Options], ...]] = {
    "cpu": (("CPUExecutionProvider", {}),),
    "cuda": (("CUDAExecutionProvider", CUDA),),
    "tensorrt": (("TensorrtExecutionProvider", {}), ("CUDAExecutionProvider", CUDA)),
}
"""By the value of `execution_provider` in config.pbtxt."""

Shapes = Mapping[str, tuple[int, ...]]


def session(
    path: Path, provider: str = "cpu", threads: int = 0, options: Options | None = None, device_id: int = 0
) -> "InferenceSession":
    """`threads` 0 takes every core this process may use; `options` are the first execution provider's; `device_id` is
    the GPU's. Raises ValueError where that isn't to be had: ONNX Runtime would go on without it, and without a word."""
    # Imported here: what reads token ids and settings only must not need ONNX Runtime.
    import onnxruntime

    if provider not in PROVIDERS:
        raise ValueError(f"execution_provider is one of {', '.join(PROVIDERS)}, not {provider!r}")
    (first, own), *others = PROVIDERS[provider]
    if first not in onnxruntime.get_available_providers():
        raise ValueError(f"{provider}: this onnxruntime has no {first}; install onnxruntime-gpu in its place")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or available_cores()
    # Triton runs several sessions on the same cores; threads that spin while idle would slow the others down.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    device = {} if provider == "cpu" else {"device_id": str(device_id)}
    rest = [(name, {**given, **device}) for name, given in others]
    providers = [(first, {**own, **(options or {}), **device}), *rest]
    # Its own fallback would try again on the CPU, and hide why.
    made = onnxruntime.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
    if first not in made.get_providers():
        raise ValueError(
            f"{provider}: {first} could not be loaded on this machine (its log says why: CUDA, cuDNN or TensorRT "
            "libraries are missing or of another version)"
        )
    return made


def tensorrt_options(least: Shapes, usual: Shapes, most: Shapes, cache: str) -> Options:
    """Explicit shape profiles by input name, so that one engine serves all requests; built at the first start, which
    takes minutes, it is kept in the folder `cache`."""
    profiles = {
        f"trt_profile_{kind}_shapes": ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
        for kind, shapes in (("min", least), ("opt", usual), ("max", most))
    }
    return {
        **profiles,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        # In half it destroys the features (benchmarks/precision.md).
        "trt_layer_norm_fp32_fallback": "1",
    }


def available_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores by affinity and by the container's quota, which ONNX Runtime doesn't look at."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2 here, or no quota ("max")
        return cores


def encoder_options(sizes: Sizes, batch: int, block: int, cache: str) -> Options:
    """For TensorRT: the shapes that `encode` comes with, `batch` requests at most."""
    image = sizes.image_tokens

    def shapes(requests: int, prompt: int) -> dict[str, tuple[int, ...]]:
        ids = (requests, prompt)
        return {"image_features": (requests, image, sizes.d_model), "input_ids": ids, "attention_mask": ids}

    usual, most = (in_blocks(length, block) - image for length in (image + 1, sizes.max_position_embeddings))
    return tensorrt_options(shapes(1, 1), shapes(1, usual), shapes(batch, most), cache)
