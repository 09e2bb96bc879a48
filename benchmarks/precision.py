"""What half precision and 8 bits cost: scores of the demo checkpoint, answers that change, and drift block by block.

python benchmarks/precision.py --work DIR [--pictures N]
"""

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench import PROMPT_IDS
from florence2_demo.evaluate import Row, evaluate
from florence2_evaluation.onnx_model import OnnxModel
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question
from florence2_export import graphs
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import export, sizes_of
from florence2_export.onnx_files import PRECISIONS
from one_request import NUM_BEAMS, prepare
from tables import Table, environment
from torch import Tensor, nn

from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, read_json

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo" / "checkpoint"
GENERATIONS, NEW_TOKENS = 32, 50


class Recorded(OnnxModel):
    """Keeps its answers."""

    def __init__(self, export: Path) -> None:
        super().__init__(export)
        self.answers: list[str] = []

    def predict(self, asked: Iterable[Question], *rest: Any) -> Iterator[Prediction]:
        for prediction in super().predict(asked, *rest):
            self.answers.append(prediction.text)
            yield prediction


def demo(work: Path, pictures: int) -> str:
    """Scores of the demo checkpoint, 3 beams, on pictures it was not trained on."""
    found: dict[str, list[Row]] = {}
    answers: dict[str, list[str]] = {}
    for precision in PRECISIONS:
        folder = work / f"demo-{precision}"
        export(str(DEMO), folder, precision=precision)
        model = Recorded(folder)
        found[precision] = evaluate(model, pictures, seed=1)
        answers[precision] = model.answers
    rows = Table("pictures", "task", "figure", "asked", *PRECISIONS)
    for same in zip(*found.values(), strict=True):
        first = same[0]
        rows.add(
            first.pictures, f"`{first.task}`", first.figure, str(first.count), *(f"{row.value:.3f}" for row in same)
        )
    equal = [_equal(answers["fp32"], given) for given in answers.values()]
    rows.add("all", "all", "the same answer as fp32", str(len(answers["fp32"])), *(f"{share:.3f}" for share in equal))
    return str(rows)


def _equal(reference: list[Any], given: list[Any]) -> float:
    return float(np.mean([one == other for one, other in zip(reference, given, strict=True)]))


def true_size(checkpoint: Path, work: Path) -> str:
    """Generations of random weights, which are less sure of every token than a trained model is."""
    tokens: dict[str, list[list[int]]] = {}
    parities = {}
    for precision in PRECISIONS:
        folder = work / f"base-{precision}"
        parities[precision] = export(str(checkpoint), folder, precision=precision).parity["graphs"]
        tokens[precision] = _generations(folder)
    rows = Table("Florence-2-base, random weights", *PRECISIONS)
    rows.add("the same token ids as fp32", *(f"{_equal(tokens['fp32'], given):.3f}" for given in tokens.values()))
    for graph in ("vision_encoder", "encoder", "decoder"):
        rows.add(f"{graph}: largest difference", *(f"{found[graph]['relative']:.1e}" for found in parities.values()))
    return str(rows)


def _generations(folder: Path) -> list[list[int]]:
    sizes = Manifest.read(folder).sizes
    config = read_json(folder / "generation_config.json")
    settings = GenerationSettings.from_config(config, sizes.max_position_embeddings)
    settings = settings.override(num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS)
    vision = session(folder / "vision_encoder.onnx")
    caches = CacheSizes.of(sizes, rows=8 * NUM_BEAMS, length=NEW_TOKENS + 1)
    runner = GraphRunner(folder, caches)
    engine = Engine(runner, Scheduler(runner.caches, GENERATIONS, 2))
    found: dict[int, Generation | Exception] = {}
    for index in range(GENERATIONS):
        features = vision.run(None, {"pixels": _picture(sizes.image_height, sizes.image_width, index)})[0][0]
        prompt = PROMPT_IDS.copy()
        prompt[1] += index

        def respond(answer: Generation | Exception, index: int = index) -> None:
            found[index] = answer

        engine.submit(Request(features, prompt, settings, respond))
    engine.finish()
    answers = [found[index] for index in range(GENERATIONS)]
    assert all(isinstance(answer, Generation) for answer in answers), answers
    return [answer.token_ids.tolist() for answer in answers if isinstance(answer, Generation)]


def _picture(height: int, width: int, seed: int) -> np.ndarray:
    """u8 [1, H, W, 3]"""
    noise = np.random.default_rng(seed).integers(0, 256, (1, height // 64, width // 64, 3)).astype(np.uint8)
    return noise.repeat(64, axis=1).repeat(64, axis=2)


# --- drift ---


def _norm_in_half(hidden: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Every intermediate result rounded, as where a graph's LayerNormalization is computed in its inputs' type."""
    centred = hidden - hidden.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def _softmax_in_half(scores: Tensor, dim: int) -> Tensor:
    grown = (scores - scores.amax(dim, keepdim=True)).exp()
    return grown / grown.sum(dim, keepdim=True)


VARIANTS: dict[str, tuple[torch.dtype, dict[str, Callable]]] = {
    "fp16, as exported": (torch.float16, {}),
    "LayerNorm in half": (torch.float16, {"norm": _norm_in_half}),
    "softmax in half": (torch.float16, {"softmax": _softmax_in_half}),
    "bf16, as exported": (torch.bfloat16, {}),
}


@contextmanager
def _patched(norm: Callable | None = None, softmax: Callable | None = None) -> Iterator[None]:
    with (
        patch.object(nn.functional, "layer_norm", norm or nn.functional.layer_norm),
        patch.object(torch, "softmax", softmax or torch.softmax),
    ):
        yield


@torch.inference_mode()
def _streams(module: nn.Module, dtype: torch.dtype, inputs: Callable[[torch.dtype], tuple]) -> dict[str, Tensor]:
    """What goes into every LayerNorm: the residual stream."""
    module = copy.deepcopy(module).to(dtype)
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        return lambda _, given: seen.__setitem__(name, given[0].float())

    for name, part in module.named_modules():
        if isinstance(part, nn.LayerNorm):
            part.register_forward_pre_hook(watch(name))
    module(*inputs(dtype))
    return seen


def drift(checkpoint: Checkpoint) -> str:
    """The residual stream before every LayerNorm, against fp32: largest difference in thousandths of the largest."""
    sizes = sizes_of(checkpoint)
    pixels = torch.tensor(_picture(sizes.image_height, sizes.image_width, seed=0))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, sizes.image_tokens, sizes.d_model, generator=generator)
    prompt = torch.tensor(PROMPT_IDS)[None]

    def decoding(dtype: torch.dtype) -> tuple:
        example = list(graphs.DECODER.example(sizes, dtype))
        random = torch.Generator().manual_seed(1)
        example[0] = torch.randint(0, sizes.vocab_size, example[0].shape, generator=random)
        for caches in (8, 9):
            example[caches] = [torch.randn(cache.shape, generator=random).to(dtype) for cache in example[caches]]
        return tuple(example)

    works: list[tuple[graphs.Graph, Callable[[torch.dtype], tuple]]] = [
        (graphs.VISION_ENCODER, lambda _: (pixels,)),
        (graphs.ENCODER, lambda _: (features, prompt, torch.ones_like(prompt))),
        (graphs.DECODER, decoding),
    ]
    rows = Table("LayerNorms", *VARIANTS)
    for graph, inputs in works:
        module = graph.build(checkpoint.model, checkpoint.preprocessor).eval()
        reference = _streams(module, torch.float32, inputs)
        found: dict[str, dict[str, float]] = {}
        for variant, (dtype, parts) in VARIANTS.items():
            with _patched(**parts):
                streams = _streams(module, dtype, inputs)
            for name, expected in reference.items():
                difference = (streams[name] - expected).abs().max() / expected.abs().max()
                place = f"{graph.name} {_block(name)}"
                before = found.setdefault(place, {}).get(variant, 0.0)
                found[place][variant] = float(np.maximum(before, 1e3 * difference))
        for place, figures in found.items():
            rows.add(place, *(f"{figures[variant]:.2f}" for variant in VARIANTS))
    return str(rows)


def _block(name: str) -> str:
    """vision_tower.blocks.2.5.spatial_block.norm1 -> blocks.2, encoder.layers.3.final_layer_norm -> layers.3."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[number - 1 : number + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 4 GB")
    parser.add_argument("--pictures", type=int, default=300, help="of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base, _ = prepare(arguments.work)
    found = [
        ("The demo checkpoint", demo.__doc__, demo(arguments.work, arguments.pictures)),
        ("True size", true_size.__doc__, true_size(base, arguments.work)),
        ("Drift, the demo checkpoint", drift.__doc__, drift(load_checkpoint(str(DEMO)))),
        ("Drift, Florence-2-base with random weights", drift.__doc__, drift(load_checkpoint(str(base)))),
    ]
    text = "\n".join(f"## {title}\n\n{note}\n\n{table}" for title, note, table in found)
    print(text)
    (HERE / "precision.md").write_text(f"# Precision\n\n{text}\n{environment('onnx')}")


if __name__ == "__main__":
    main()
