"""A checkpoint -> an export folder: ONNX graphs, the settings they need, and `manifest.json`."""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
from tqdm import tqdm

from florence2.generation.settings import GenerationSettings
from florence2.manifest import FILE_NAME, Manifest, Sizes, sha256_of
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.graphs import GRAPHS, Graph
from florence2_export.onnx_files import OPSET, quiet, write_onnx
from florence2_export.parity import Comparison
from florence2_export.source import open_source

PACKAGES = ("florence2-triton", "torch", "transformers", "onnx", "onnxscript")


def export(source: str, output: Path, revision: str | None = None, precision: str = "fp32") -> Manifest:
    """Export `source`, a folder or hub id, to `output`. Done already, it returns at once; on failure `output` stays.
    `precision` is one of PRECISIONS.

    Raises CheckpointError for a checkpoint that can't be read, ValueError for one that can't be exported faithfully.
    """
    output = output.resolve()
    if done := done_already(output, source, revision, precision):
        return done
    with filled(output) as folder:
        return _export_into(folder, source, revision, precision)


@contextlib.contextmanager
def filled(output: Path) -> Iterator[Path]:
    """An empty folder, which takes `output`'s place once it is filled; on failure `output` stays."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        folder.rename(output)


def _export_into(folder: Path, source: str, revision: str | None, precision: str) -> Manifest:
    with progress(3 + len(GRAPHS)) as step:
        with step("reading the checkpoint"):
            checkpoint = load_checkpoint(source, revision)
            sizes = sizes_of(checkpoint)
            GenerationSettings.from_config(checkpoint.generation, sizes.max_position_embeddings)
            _write_settings(checkpoint, folder)
        for graph in GRAPHS:
            with step(f"exporting {graph.name}"):
                _write_graph(graph, checkpoint, sizes, folder, precision)
        comparison = Comparison(checkpoint, sizes, folder)
        with step("comparing the vision encoder with the checkpoint"):
            comparison.vision()
        with step("comparing encoder, decoder and generations with the checkpoint"), quiet("transformers"):
            comparison.text()
    comparison.parity.check(precision)
    manifest = manifest_of(checkpoint, sizes, folder, precision, asdict(comparison.parity))
    manifest.write(folder)
    return manifest


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """Gives what is to be entered around each step, by name: a bar on a terminal, a line per step in a log."""
    with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:

        @contextlib.contextmanager
        def step(name: str) -> Iterator[None]:
            bar.set_description(name)
            if bar.disable:
                print(name, flush=True)
            yield
            bar.update()

        yield step


def manifest_of(checkpoint: Checkpoint, sizes: Sizes, folder: Path, precision: str, parity: dict[str, Any]) -> Manifest:
    """Of everything in `folder`."""
    return Manifest(
        source=checkpoint.source,
        revision=checkpoint.revision,
        sha256=checkpoint.sha256,
        layout=checkpoint.layout,
        repairs=checkpoint.repairs,
        precision=precision,
        opset=OPSET,
        sizes=sizes,
        banned_grounding_phrases=checkpoint.banned_grounding_phrases,
        tools=_tools(),
        files={
            path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
        parity=parity,
    )


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


def _write_graph(graph: Graph, checkpoint: Checkpoint, sizes: Sizes, folder: Path, precision: str) -> None:
    module = graph.build(checkpoint.model, checkpoint.preprocessor)
    # Weights beside the graph: a protobuf ends at 2 GB, and ONNX Runtime maps the file instead of copying it.
    has_weights = any(True for _ in module.parameters())
    write_onnx(module, graph.signature(sizes), folder / f"{graph.name}.onnx", precision, external_data=has_weights)


def done_already(
    output: Path, source: str, revision: str | None, precision: str, name: str = FILE_NAME
) -> Manifest | None:
    """The manifest, called `name`, of what `output` holds, if that is what would be made now. Refuses to replace a
    folder that is something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / name).is_file():
        raise ValueError(f"{output} exists and is not an export; give another --output, or remove it")
    try:
        done = Manifest.read(output, name)
    except ValueError as error:
        raise ValueError(f"{error}; give another --output, or remove {output}") from None
    return done if _unchanged(done, output, open_source(source, revision).sha256(), precision) else None


def _unchanged(done: Manifest, output: Path, sha256: str, precision: str) -> bool:
    made_alike = (done.sha256, done.precision, done.opset, done.tools) == (sha256, precision, OPSET, _tools())
    return made_alike and all(
        (output / name).is_file() and sha256_of(output / name) == sha256 for name, sha256 in done.files.items()
    )


def _tools() -> dict[str, str]:
    """What an export depends on beside its checkpoint: packages, and this exporter's own code."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    # By what it says itself: onnxruntime-gpu is another package with the same module.
    found = {name: version(name) for name in PACKAGES} | {"onnxruntime": onnxruntime.__version__}
    return {**found, "exporter": code.hexdigest()}
