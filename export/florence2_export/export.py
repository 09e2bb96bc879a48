"""A checkpoint -> an export folder: three ONNX graphs, the settings they need, and `manifest.json`."""

import contextlib
import hashlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from florence2.generation.settings import GenerationSettings
from florence2.manifest import FILE_NAME, Manifest, Sizes, sha256_of
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.graphs import GRAPHS, Graph
from florence2_export.parity import Comparison
from florence2_export.source import open_source

OPSET = 20
"""The first with Gelu as one operator; TensorRT 10 and Triton's ONNX Runtime read it."""
PRECISION = "fp32"
PACKAGES = ("florence2-triton", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")

logger = logging.getLogger(__name__)


def export(source: str, output: Path, revision: str | None = None) -> Manifest:
    """Export `source`, a folder or hub id, to `output`. Done already, it returns at once; on failure `output` stays.

    Raises CheckpointError for a checkpoint that can't be read, ValueError for one that can't be exported faithfully.
    """
    output = output.resolve()
    done = _existing(output)
    if done and _unchanged(done, output, open_source(source, revision).sha256()):
        return done
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        manifest = _export_into(folder, source, revision)
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        folder.rename(output)
    return manifest


def _export_into(folder: Path, source: str, revision: str | None) -> Manifest:
    # A bar on a terminal; a line per step in a log.
    with tqdm(total=3 + len(GRAPHS), unit="step", leave=False, disable=None) as bar:

        @contextlib.contextmanager
        def step(name: str) -> Iterator[None]:
            bar.set_description(name)
            if bar.disable:
                print(name, flush=True)
            yield
            bar.update()

        with step("reading the checkpoint"):
            checkpoint = load_checkpoint(source, revision)
            sizes = sizes_of(checkpoint)
            GenerationSettings.from_config(checkpoint.generation, sizes.max_position_embeddings)
            _write_settings(checkpoint, folder)
        for graph in GRAPHS:
            with step(f"exporting {graph.name}"):
                _write_graph(graph, checkpoint, sizes, folder)
        comparison = Comparison(checkpoint, sizes, folder)
        with step("comparing the vision encoder with the checkpoint"):
            comparison.vision()
        with step("comparing encoder, decoder and generations with the checkpoint"), _quiet("transformers"):
            comparison.text()
    comparison.parity.check(PRECISION)
    manifest = Manifest(
        source=checkpoint.source,
        revision=checkpoint.revision,
        sha256=checkpoint.sha256,
        layout=checkpoint.layout,
        repairs=checkpoint.repairs,
        precision=PRECISION,
        opset=OPSET,
        sizes=sizes,
        banned_grounding_phrases=checkpoint.banned_grounding_phrases,
        tools=_tools(),
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        parity=asdict(comparison.parity),
    )
    manifest.write(folder)
    return manifest


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    # transformers types its sub-configs as dicts too.
    text: Any = checkpoint.model.config.text_config
    size = checkpoint.preprocessor["size"]
    locations = sum(bool(re.fullmatch(r"<loc_\d+>", token)) for token in checkpoint.tokenizer.get_vocab())
    return Sizes(
        image_height=size["height"],
        image_width=size["width"],
        image_tokens=checkpoint.preprocessor["image_seq_length"],
        d_model=text.d_model,
        vocab_size=checkpoint.model.lm_head.out_features,
        decoder_layers=text.decoder_layers,
        decoder_attention_heads=text.decoder_attention_heads,
        head_dim=text.d_model // text.decoder_attention_heads,
        max_position_embeddings=text.max_position_embeddings,
        location_bins=locations,
    )


def _write_settings(checkpoint: Checkpoint, folder: Path) -> None:
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("preprocessor_config.json", checkpoint.preprocessor),
        ("generation_config.json", checkpoint.generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_graph(graph: Graph, checkpoint: Checkpoint, sizes: Sizes, folder: Path) -> None:
    module = graph.build(checkpoint.model, checkpoint.preprocessor).eval()
    with _quiet("torch.onnx"):
        program = torch.onnx.export(
            module,
            graph.example(sizes),
            dynamo=True,
            dynamic_shapes=graph.dynamic_shapes(sizes),
            input_names=graph.input_names(sizes),
            output_names=graph.output_names(sizes),
            opset_version=OPSET,
            verbose=False,
        )
    # Weights beside the graph: a protobuf ends at 2 GB, and ONNX Runtime maps the file instead of copying it.
    assert program is not None
    program.save(folder / f"{graph.name}.onnx", external_data=True)


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """The exporter's remarks on axis names and transformers' on lengths given twice help nobody here."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for found in levels:
                found.setLevel(logging.ERROR)
            yield
    finally:
        for found, level in levels.items():
            found.setLevel(level)


def _existing(output: Path) -> Manifest | None:
    """The export that `output` holds. Refuses to replace a folder that is something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / FILE_NAME).is_file():
        raise ValueError(f"{output} exists and is not an export; give another --output, or remove it")
    try:
        return Manifest.read(output)
    except ValueError as error:
        raise ValueError(f"{error}; give another --output, or remove {output}") from None


def _unchanged(done: Manifest, output: Path, sha256: str) -> bool:
    made_alike = (done.sha256, done.precision, done.opset, done.tools) == (sha256, PRECISION, OPSET, _tools())
    return made_alike and all(
        (output / name).is_file() and sha256_of(output / name) == sha256 for name, sha256 in done.files.items()
    )


def _tools() -> dict[str, str]:
    """What an export depends on beside its checkpoint: packages, and this exporter's own code."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    return {**{name: version(name) for name in PACKAGES}, "exporter": code.hexdigest()}
