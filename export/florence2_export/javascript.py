"""A checkpoint -> a folder that transformers.js loads, from disk or from the hub: `--layout transformers.js`.

Four graphs in three precisions under `onnx/`, with the names and tensors of onnx-community's Florence-2 files, and the
settings files that transformers.js reads. Names and rules are those of @huggingface/transformers 4.3.
"""

import json
from pathlib import Path

from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, Sizes
from florence2.tasks import TASKS, Takes
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import done_already, filled, manifest_of, progress, sizes_of
from florence2_export.graphs import Graph
from florence2_export.javascript_graphs import EMBED_TOKENS, GRAPHS, QuantizedEmbedding
from florence2_export.javascript_parity import GreedyComparison
from florence2_export.onnx_files import quiet, save, trace
from florence2_export.tokenizer import BOS, EOS, PAD

FILE_NAME = "export.json"
"""Not manifest.json, so that `florence2 release` and this layout don't take each other's folders for their own."""

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
"""Of the files, by precision; to transformers.js they are the dtypes fp32, fp16 and q8."""


def export_javascript(source: str, output: Path, revision: str | None = None) -> Manifest:
    """Like `export`, in all precisions at once; the manifest is FILE_NAME. Raises what `export` raises."""
    output, precision = output.resolve(), ", ".join(SUFFIXES)
    if done := done_already(output, source, revision, precision, FILE_NAME):
        return done
    with filled(output) as folder, progress(2 + len(GRAPHS)) as step:
        with step("reading the checkpoint"):
            checkpoint = load_checkpoint(source, revision)
            sizes = sizes_of(checkpoint)
            settings = GenerationSettings.from_config(checkpoint.generation, sizes.max_position_embeddings)
            _write_settings(checkpoint, sizes, settings, folder)
        (folder / "onnx").mkdir()
        for graph in GRAPHS:
            with step(f"exporting {graph.name}"):
                _write_graph(graph, checkpoint, sizes, folder)
        with step("comparing generations with the checkpoint"), quiet("transformers"):
            comparison = GreedyComparison(checkpoint, sizes, settings)
            parity = {name: comparison.run(folder, suffix, name) for name, suffix in SUFFIXES.items()}
        manifest = manifest_of(checkpoint, sizes, folder, precision, parity)
        manifest.write(folder, FILE_NAME)
    return manifest


def _write_graph(graph: Graph, checkpoint: Checkpoint, sizes: Sizes, folder: Path) -> None:
    module, signature = graph.build(checkpoint.model, checkpoint.preprocessor), graph.signature(sizes)
    paths = {precision: folder / "onnx" / f"{graph.name}{suffix}.onnx" for precision, suffix in SUFFIXES.items()}
    # One file each: a browser fetches it whole, and the largest graph of Florence-2-large has 1.5 GB in float32.
    whole = trace(module, signature, half=False)
    save(whole, signature, paths["fp32"], "fp32", external_data=False)
    save(trace(module, signature, half=True), signature, paths["fp16"], "fp16", external_data=False)
    if graph is EMBED_TOKENS:
        # There is no multiplication in it to quantise; and browsers download the table too.
        embedding = trace(QuantizedEmbedding(checkpoint.model), signature, half=False)
        save(embedding, signature, paths["int8"], "fp32", external_data=False)
    else:
        save(whole, signature, paths["int8"], "int8", external_data=False)


def _write_settings(checkpoint: Checkpoint, sizes: Sizes, settings: GenerationSettings, folder: Path) -> None:
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    contents = {
        "config.json": {
            "architectures": ["Florence2ForConditionalGeneration"],
            **checkpoint.model.config.to_diff_dict(),
        },
        # A length, or its default of 20 holds. It has no beam search: more beams would only cost time.
        "generation_config.json": {
            **checkpoint.generation,
            **{"max_length": settings.max_length, "num_beams": 1, "do_sample": False},
        },
        "preprocessor_config.json": {
            **checkpoint.preprocessor,
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "Florence2Processor",
            **_task_tables(),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BartTokenizer",
            **{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
            "model_max_length": sizes.max_position_embeddings,
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _task_tables() -> dict[str, dict[str, str]]:
    """Without them transformers.js sends `<OD>` to the model as it stands."""
    return {
        "task_prompts_without_inputs": {t.token: t.prompt for t in TASKS.values() if t.takes is Takes.NOTHING},
        "task_prompts_with_input": {t.token: t.prompt for t in TASKS.values() if t.takes is not Takes.NOTHING},
        "tasks_answer_post_processing_type": {t.token: t.answer.value for t in TASKS.values()},
    }
