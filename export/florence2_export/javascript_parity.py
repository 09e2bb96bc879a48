"""The graphs for JavaScript, run greedily as transformers.js runs them, against the checkpoint's own `generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from florence2.generation.beam_search import GreedySearches
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Sizes
from florence2.prompts import PromptEncoder
from florence2_export.checkpoint import Checkpoint
from florence2_export.parity import (
    NEW_TOKENS,
    PROMPTS,
    example_pictures,
    reference_features,
    reference_generate,
)
from florence2_export.tolerance import TOLERANCE

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Greedy:
    """What one row of a batch became."""

    token_ids: list[int]
    """Decoder start included."""
    logits: NDArray[np.float32]
    """[L - 1, V], as the decoder gave them."""


class GreedyRunner:
    """The four graphs of one precision; `suffix` is that of their files."""

    def __init__(self, folder: Path, suffix: str, threads: int = 0) -> None:
        names = ("vision_encoder", "embed_tokens", "encoder_model", "decoder_model_merged")
        self.vision, self.embed, self.encoder, self.decoder = (
            session(folder / "onnx" / f"{name}{suffix}.onnx", threads=threads) for name in names
        )

    def generate(
        self,
        pixel_values: NDArray[np.float32],
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        settings: GenerationSettings,
    ) -> list[Greedy]:
        """[B, 3, H, W], [B, S] and [B, S], 0 on padding -> one answer per row."""
        (features,) = self.vision.run(None, {"pixel_values": pixel_values})
        mask = np.concatenate([np.ones(features.shape[:2], np.int64), attention_mask], axis=1)
        embedded = np.concatenate([features, self._embedded(input_ids)], axis=1)
        (hidden,) = self.encoder.run(None, {"attention_mask": mask, "inputs_embeds": embedded})
        feeds = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden, **self._no_past(len(input_ids))}
        rows = range(len(input_ids))
        searches = GreedySearches[int]()
        for row in rows:
            searches.add(row, settings)
        logits: list[NDArray[np.float32]] = []
        answers: dict[int, Greedy] = {}
        while len(answers) < len(rows):
            feeds["inputs_embeds"] = self._embedded(searches.input_ids.astype(np.int64))
            logits.append(self._step(feeds))
            # Who has finished goes along: the graphs' caches have a row for each.
            for row in np.flatnonzero(_advance(searches, logits[-1])).tolist():
                if row not in answers:
                    own = np.stack([step[row] for step in logits])
                    answers[row] = Greedy(searches.result(row).token_ids.tolist(), own)
        return [answers[row] for row in rows]

    def _embedded(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.embed.run(None, {"input_ids": input_ids})[0]

    def _no_past(self, batch: int) -> Feeds:
        """By the graph's own shapes, as transformers.js does it: every dimension but the batch that has a name is 0."""
        feeds: Feeds = {"use_cache_branch": np.zeros(1, np.bool_)}
        for cache in self.decoder.get_inputs():
            if cache.name.startswith("past_key_values."):
                shape = [
                    batch if side == "batch_size" else 0 if isinstance(side, str) else side for side in cache.shape
                ]
                feeds[cache.name] = np.zeros(shape, np.float32)
        return feeds

    def _step(self, feeds: Feeds) -> NDArray[np.float32]:
        """One token further: `feeds` becomes the next step's. -> logits [B, V]."""
        names = [output.name for output in self.decoder.get_outputs()]
        outputs = dict(zip(names, self.decoder.run(names, feeds), strict=True))
        for name in names[1:]:
            # Those of the encoder are made once.
            if ".decoder." in name or not feeds["use_cache_branch"]:
                feeds[name.replace("present", "past_key_values")] = outputs[name]
        feeds["use_cache_branch"] = np.ones(1, np.bool_)
        return outputs["logits"][:, -1]


def _advance(searches: GreedySearches, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """-> whose answer is finished."""
    allowed = logits.copy()
    allowed[searches.banned_tokens()] = -np.inf
    best = allowed.argmax(axis=1)[:, None, None]
    return searches.advance(best, np.zeros(best.shape, np.float32))


def pixel_values(pixels: NDArray[np.uint8], preprocessor: dict[str, Any]) -> NDArray[np.float32]:
    """u8 [B, H, W, 3] -> [B, 3, H, W], in the order of operations of both libraries."""
    mean, std = (np.array(preprocessor[name], np.float32) for name in ("image_mean", "image_std"))
    values = (pixels.astype(np.float32) * np.float32(preprocessor["rescale_factor"]) - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


class GreedyComparison:
    """What transformers' greedy `generate` says for a few pictures and prompts, and how the graphs do beside it."""

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, settings: GenerationSettings) -> None:
        self.checkpoint = checkpoint
        self.settings = settings.override(num_beams=1, max_new_tokens=NEW_TOKENS)
        encoder = PromptEncoder(checkpoint.tokenizer, sizes)
        self.prompts = [encoder.encode(prompt) for prompt in PROMPTS]
        self.pixels = example_pictures(len(PROMPTS), sizes)
        self.expected = []
        for features, prompt in zip(reference_features(checkpoint, self.pixels), self.prompts, strict=True):
            asked: dict[str, Any] = {"num_beams": 1, "max_new_tokens": NEW_TOKENS}
            answer = reference_generate(checkpoint.model, features, prompt, **asked)
            logits = np.concatenate([step.numpy() for step in answer.logits])
            self.expected.append(Greedy(answer.sequences[0].tolist(), logits))

    def run(self, folder: Path, suffix: str, precision: str) -> dict[str, float]:
        """Figures of one precision. Raises ValueError, with them, if they are not good enough."""
        runner = GreedyRunner(folder, suffix)
        equal, relative = 0, 0.0
        for pixels, prompt, expected in zip(self.pixels, self.prompts, self.expected, strict=True):
            values = pixel_values(pixels[None], self.checkpoint.preprocessor)
            (found,) = runner.generate(values, prompt[None], np.ones_like(prompt)[None], self.settings)
            equal += found.token_ids == expected.token_ids
            # As long as both have seen the same tokens.
            steps = _common_length(found.token_ids[:-1], expected.token_ids[:-1])
            difference = np.abs(found.logits[:steps] - expected.logits[:steps]).max()
            relative = float(np.maximum(relative, difference / np.abs(expected.logits[:steps]).max()))
        if not relative <= TOLERANCE[precision]:
            raise ValueError(
                f"in {precision} the graphs' logits differ from the checkpoint's by {relative:.2e} of their largest "
                f"value; {TOLERANCE[precision]:.0e} is allowed"
            )
        if precision == "fp32" and equal < len(self.expected):
            raise ValueError(f"only {equal} of {len(self.expected)} generations have the checkpoint's token ids")
        return {"relative": relative, "generations": len(self.expected), "generations_equal": equal}


def _common_length(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
