"""The model's free-running answers to many questions, parsed by transformers' own post-processor."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import Florence2Processor

from florence2_training.demo.pictures import Picture
from florence2_training.demo.samples import Sample


@dataclass(frozen=True)
class Answer:
    parsed: Any
    scores: list[float]
    """One per box: exp of the mean log-probability of its location tokens, as in Microsoft's processor."""


@torch.no_grad()
def ask(
    model: Any,
    processor: Florence2Processor,
    pictures: Sequence[Picture],
    samples: Sequence[Sample],
    greedy: bool = False,
    batch: int = 50,
) -> list[Answer]:
    """One answer per picture, with the checkpoint's own generation settings, or with one beam."""
    answers = []
    for start in tqdm(range(0, len(pictures), batch), samples[0].task if samples else ""):
        some = slice(start, start + batch)
        inputs = processor(
            text=[sample.prompt for sample in samples[some]],
            images=[picture.image for picture in pictures[some]],
            padding=True,
            return_tensors="pt",
        )
        settings = {"num_beams": 1, "early_stopping": False} if greedy else {}
        out = model.generate(**inputs, **settings, max_length=128, return_dict_in_generate=True, output_scores=True)
        # What greedy search returns are logits still.
        beams = None if greedy else out.beam_indices
        logprobs = model.compute_transition_scores(out.sequences, out.scores, beams, normalize_logits=greedy)
        for row, picture, sample in zip(range(len(out.sequences)), pictures[some], samples[some], strict=True):
            # The first id is the decoder's start: it has no score.
            tokens = processor.tokenizer.convert_ids_to_tokens(out.sequences[row, 1:])
            # The post-processor leaves the batch's padding in a plain text.
            ids = out.sequences[row][out.sequences[row] != processor.tokenizer.pad_token_id]
            text = processor.tokenizer.decode(ids, skip_special_tokens=False)
            parsed = processor.post_process_generation(text, task=sample.task, image_size=picture.image.size)
            answers.append(Answer(parsed[sample.task], _scores(tokens, logprobs[row].tolist())))
    return answers


def _scores(tokens: list[str], logprobs: list[float]) -> list[float]:
    """Location tokens that follow one another are boxes of four; what is left over is dropped."""
    scores: list[float] = []
    run: list[float] = []
    for token, logprob in zip(tokens, logprobs, strict=False):
        run = [*run, logprob] if re.fullmatch(r"<loc_\d+>", token) else []
        if len(run) == 4:
            scores.append(float(torch.tensor(run).mean().exp()))
            run = []
    return scores
