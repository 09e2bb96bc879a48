"""A run, an adapter or a fine-tuned model becomes one checkpoint that loads everywhere, proved equal to what it was."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from florence2_export.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from florence2_export.export import sizes_of
from florence2_export.parity import reference_generate
from florence2_export.pixel_values import normalised
from numpy.typing import NDArray

from florence2.prompts import PromptEncoder
from florence2_training import run_state
from florence2_training.adapters import CONFIG, base_of, load_adapter
from florence2_training.pixels import read_pixels
from florence2_training.run_folder import RUN
from florence2_training.saving import make_native, save_microsoft, save_native, set_no_repeat_ngram_size

SAMPLES, NEW_TOKENS = 4, 64
LAYOUTS = {"native": save_native, "microsoft": save_microsoft}
TOLERANCE = 1e-3
"""Of log-probabilities: two fp32 sums of the same products in another order stay well below."""


@dataclass(frozen=True)
class Merged:
    source: Path
    """The checkpoint of the run, or the folder, that was merged."""
    samples: int
    largest_difference: float
    """Between log-probabilities before and after."""


def merge(run: Path, output: Path, base: str | None = None, layout: str = "native") -> Merged:
    """Merges `run`, in fp32, into the checkpoint it was trained from, and saves it in `output`.

    `run`: a run's folder (its best checkpoint, or its last), one of its checkpoints, an adapter of peft or ms-swift on
    either layout, or a whole fine-tuned model. `base` replaces what the adapter says it belongs to. Raises ValueError
    where it can't be merged, where the result is not finite, or where its tokens differ from the unmerged model's.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give another --output, or remove it")
    source = _checkpoint_in(run)
    if (source / CONFIG).is_file():
        checkpoint, merged = _merged_adapter(source, base)
    elif base is not None:
        raise ValueError(f"{source} is a whole model, which needs no --base; leave it out")
    else:
        checkpoint, merged = load_checkpoint(str(source)), Merged(source, 0, 0.0)
    _check_finite(checkpoint.model)
    if layout == "native":
        make_native(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent.resolve()) as scratch:
        folder = Path(scratch) / output.name
        LAYOUTS[layout](checkpoint, folder)
        # What is written is read again as any user would read it.
        load_checkpoint(str(folder))
        if output.exists():
            output.rmdir()
        shutil.move(folder, output)
    return merged


def _checkpoint_in(run: Path) -> Path:
    if not run.is_dir():
        raise ValueError(f"{run} is no folder; give a run's output_dir, an adapter, or a checkpoint")
    if not (run / RUN).is_file():
        if run.name.startswith("checkpoint-") and (run / "complete.json").is_file() and not run_state.is_whole(run):
            raise ValueError(f"{run} is damaged; give another checkpoint of its run")
        return run
    newest = run_state.newest_whole(run)
    if newest is None:
        raise ValueError(f"{run} has no whole checkpoint yet; `florence2 train` goes on where it stopped")
    best_step = run_state.load_progress(newest).best_step
    if best_step is None:
        return newest
    best = run_state.folder_of(run, best_step)
    if not run_state.is_whole(best):
        raise ValueError(f"{best}, the best, is missing or damaged; to merge another, give its folder: {newest}")
    return best


def _merged_adapter(folder: Path, base: str | None) -> tuple[Checkpoint, Merged]:
    name, revision = (base, None) if base else base_of(folder)
    if not name:
        raise ValueError(f"{folder / CONFIG} names no base model; give it with --base")
    checkpoint = load_checkpoint(name, revision)
    run = folder.parent / RUN
    if base is None and run.is_file() and json.loads(run.read_text())["sha256"] != checkpoint.sha256:
        raise ValueError(f"{name} is not what the run was trained from any more; bring that back, or give it as --base")
    # As it was when the run began; an adapter of another trainer doesn't see the rows that this adds.
    make_native(checkpoint)
    _decode_as_trained(folder.parent, checkpoint)
    adapted = load_adapter(checkpoint.model, folder).eval()
    questions = _questions(folder.parent, checkpoint)
    before = [_answer(checkpoint.model, *question) for question in questions]
    try:
        checkpoint.model = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    after = [_answer(checkpoint.model, *question) for question in questions]
    return checkpoint, Merged(folder, len(questions), _compare(before, after))


def _decode_as_trained(run: Path, checkpoint: Checkpoint) -> None:
    if (run / RUN).is_file():
        size = json.loads((run / RUN).read_text())["no_repeat_ngram_size"]
        if size is not None:
            set_no_repeat_ngram_size(checkpoint, size)


Question = tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, Any]]


def _questions(run: Path, checkpoint: Checkpoint) -> list[Question]:
    """The run's own samples where they are at hand, else drawn noise under two tasks."""
    encoder = PromptEncoder(checkpoint.tokenizer, sizes_of(checkpoint))
    size = checkpoint.preprocessor["size"]
    asked: list[tuple[NDArray[np.uint8], str]] = []
    data = run / "data" / "0"
    for name in ("validation.jsonl", "train.jsonl"):
        if not asked and (data / name).is_file():
            with (data / name).open() as file:
                lines = [json.loads(line) for line in islice(file, SAMPLES)]
            present = [line for line in lines if Path(line["image"]).is_file()]
            asked = [(read_pixels([line["image"]], checkpoint.preprocessor)[0], line["prefix"]) for line in present]
    if not asked:
        rng = np.random.default_rng(0)
        shape = (size["height"], size["width"], 3)
        asked = [(rng.integers(0, 256, shape).astype(np.uint8), task) for task in ("<OD>", "<CAPTION>")]
    return [(pixels, encoder.encode(prompt), checkpoint.preprocessor) for pixels, prompt in asked]


@torch.inference_mode()
def _answer(
    model: Any, pixels: NDArray[np.uint8], prompt: NDArray[np.int64], preprocessor: dict[str, Any]
) -> "Generated":
    """Greedily."""
    seen = model.get_image_features(normalised(torch.from_numpy(pixels[None]), preprocessor)).pooler_output
    generated = reference_generate(
        model, seen[0].numpy(), prompt, num_beams=1, early_stopping=False, max_length=1 + NEW_TOKENS
    )
    scores = model.compute_transition_scores(generated.sequences, generated.logits, normalize_logits=True)
    return generated.sequences[0].tolist(), scores[0]


Generated = tuple[list[int], torch.Tensor]
"""Token ids, and the log-probability of each."""


def _compare(before: Sequence[Generated], after: Sequence[Generated]) -> float:
    """The largest difference of log-probabilities."""
    largest = 0.0
    for (ids, scores), (merged_ids, merged_scores) in zip(before, after, strict=True):
        if ids != merged_ids:
            raise ValueError(
                f"the merged model answers {merged_ids} where the unmerged one answers {ids}; nothing was saved: "
                "check that the adapter belongs to this base"
            )
        finite = torch.isfinite(scores)
        largest = max(largest, float((scores - merged_scores)[finite].abs().max()))
    if largest > TOLERANCE:
        raise ValueError(f"merged and unmerged log-probabilities differ by {largest:.1e}; nothing was saved")
    return largest


def _check_finite(model: Any) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are no numbers: training diverged; take an earlier checkpoint")
