"""An export's vision encoder -> a TensorRT plan, on the machine that is to serve it.

Neither torch nor transformers: this runs in the server's image.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from florence2.generation.sessions import session
from florence2.manifest import Manifest
from florence2_export.tolerance import TOLERANCE

GRAPH, PLAN = "vision_encoder.onnx", "vision_encoder.plan"
BATCH = 8
"""max_batch_size of vision_encoder's profile tensorrt."""


def build(export: Path, cache: Path) -> Path:
    """EXPORT/vision_encoder.plan, from `cache` if it was built there before of this graph, with this TensorRT, for this
    GPU. Raises ValueError for what is missing here, or if the plan's features are not the export's."""
    manifest = Manifest.read(export)
    if manifest.precision not in ("fp32", "fp16"):
        raise ValueError(f"{export} is in {manifest.precision}, for CPUs; export with --precision fp16")
    trt, gpu = _tensorrt(), _gpu()
    if not os.access(export, os.W_OK):
        raise ValueError(f"{export} can't be written, where the plan is to go")
    made_of = [manifest.files[GRAPH], manifest.files[f"{GRAPH}.data"], trt.__version__, gpu, str(BATCH)]
    kept = cache / f"{hashlib.sha256(' '.join(made_of).encode()).hexdigest()[:32]}.plan"
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            plan = Path(scratch) / PLAN
            plan.write_bytes(_plan(trt, export / GRAPH, manifest, Path(scratch)))
            _compare(trt, plan, export, manifest)
            plan.replace(kept)
    shutil.copyfile(kept, export / PLAN)
    return export / PLAN


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError:
        raise ValueError(
            "TensorRT's Python package is missing: pip install 'tensorrt' in the version of the server's image "
            "(docs/docker.md), or run this in that image"
        ) from None
    return tensorrt


def _gpu() -> str:
    """Name and compute capability of the one that is used: a plan is for one kind of GPU only."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"no GPU here, as nvidia-smi says ({error}): a plan is built on the machine that serves"
        ) from None
    if not found:
        raise ValueError("no GPU here: a plan is built on the machine that serves")
    return found[0]


def _plan(trt: Any, graph: Path, manifest: Manifest, scratch: Path) -> bytes:
    given = scratch / GRAPH
    onnx.save(for_tensorrt(onnx.load(graph)), given, save_as_external_data=True, location=f"{GRAPH}.data")
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Types are the graph's own: the only way from TensorRT 11 on, a flag in 10.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(given)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ValueError(f"TensorRT {trt.__version__} can't read {graph}: {errors}")
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        # It would round fp32 to 10 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    picture = (manifest.sizes.image_height, manifest.sizes.image_width, 3)
    profile.set_shape("pixels", (1, *picture), (BATCH // 2, *picture), (BATCH, *picture))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT {trt.__version__} could build no plan of {graph}; its messages are above")
    return bytes(plan)


def for_tensorrt(model: ModelProto) -> ModelProto:
    """The same graph, as TensorRT takes it.

    LayerNormalization stands between casts where its tensors are half: what `stash_type` asks for, spelled out, as not
    every TensorRT computes it in float32 inside (benchmarks/precision.md has what half would do). And u8 pixels are
    cast, the one thing that may be done with them, before anyone asks for their shape."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        scale = weights.get(node.input[1]) if node.op_type == "LayerNormalization" else None
        if scale is None or scale.data_type != TensorProto.FLOAT16:
            nodes.append(node)
            continue
        out = node.output[0]
        nodes.append(helper.make_node("Cast", [node.input[0]], [f"{out}.given"], to=TensorProto.FLOAT))
        node.input[0], node.output[0] = f"{out}.given", f"{out}.float"
        for position in range(1, len(node.input)):
            name = node.input[position]
            wide = f"{name}.float"
            if wide not in weights:
                values = numpy_helper.to_array(weights[name]).astype(np.float32)
                weights[wide] = numpy_helper.from_array(values, wide)
                model.graph.initializer.append(weights[wide])
            node.input[position] = wide
        nodes.append(node)
        nodes.append(helper.make_node("Cast", [f"{out}.float"], [out], to=TensorProto.FLOAT16))
    pixels = model.graph.input[0].name
    cast = next(node for node in nodes if node.op_type == "Cast" and node.input[0] == pixels)
    nodes.remove(cast)
    for node in nodes:
        node.input[:] = [cast.output[0] if name == pixels else name for name in node.input]
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (cast, *nodes)]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    del model.graph.value_info[:]
    return model


def _compare(trt: Any, plan: Path, export: Path, manifest: Manifest) -> None:
    """Raises ValueError if the plan's features differ from those of the graph on the CPU."""
    shape = (2, manifest.sizes.image_height, manifest.sizes.image_width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (expected,) = session(export / GRAPH).run(None, {"pixels": pixels})
    found = _run(trt, plan, {"pixels": pixels}, expected.shape)
    relative = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not relative <= TOLERANCE[manifest.precision]:
        raise ValueError(
            f"the plan's features differ from the export's by {relative:.2e} of their largest value; "
            f"{TOLERANCE[manifest.precision]:.0e} is allowed in {manifest.precision}"
        )


def _run(trt: Any, plan: Path, inputs: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Device memory by way of ONNX Runtime, which the server's image has anyway."""
    from onnxruntime import OrtValue

    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise ValueError(f"TensorRT {trt.__version__} can't load the plan it built; its messages are above")
    context = engine.create_execution_context()
    held = {name: OrtValue.ortvalue_from_numpy(value, "cuda") for name, value in inputs.items()}
    for name, value in held.items():
        context.set_input_shape(name, value.shape())
        context.set_tensor_address(name, value.data_ptr())
    output = OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), "cuda")
    context.set_tensor_address("image_features", output.data_ptr())
    # The default stream, which the copy back to the host waits for.
    if not context.execute_async_v3(0):
        raise ValueError(f"TensorRT {trt.__version__} can't run the plan it built; its messages are above")
    return output.numpy()
