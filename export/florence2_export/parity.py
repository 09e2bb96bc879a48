"""The exported graphs against the checkpoint, in numbers: each graph by itself, then whole generations.

The reference is transformers' own code, never the modules the graphs were made from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutput

from florence2.generation.generate import generate
from florence2.generation.runner import GraphRunner, session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Sizes
from florence2.prompts import PromptEncoder
from florence2_export.checkpoint import Checkpoint

TOLERANCE = {"fp32": 1e-3}
"""Largest difference allowed in a graph's output, relative to the output's largest value, by precision."""
AGREEMENT = {"fp32": 0.9}
"""Share of whole generations that must have the checkpoint's token ids. Less than one: a near tie between two tokens
may fall either way when sums are rounded in another order."""

PROMPTS = ("<OD>", "<CAPTION>", "<CAPTION_TO_PHRASE_GROUNDING>a green car")
NEW_TOKENS = 24


@dataclass
class Parity:
    """What goes into the manifest."""

    graphs: dict[str, dict[str, float]] = field(default_factory=dict)
    generations: int = 0
    generations_equal: int = 0

    def check(self, precision: str) -> None:
        """Raises ValueError, with the figures, if a tolerance is missed."""
        for graph, figures in self.graphs.items():
            if not figures["relative"] <= TOLERANCE[precision]:
                raise ValueError(
                    f"{graph}.onnx differs from the checkpoint by {figures['relative']:.2e} of its largest value; "
                    f"{TOLERANCE[precision]:.0e} is allowed in {precision}"
                )
        if self.generations_equal < AGREEMENT[precision] * self.generations:
            raise ValueError(
                f"only {self.generations_equal} of {self.generations} generations have the checkpoint's token ids"
            )


class Comparison:
    """One checkpoint and its exported folder."""

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, folder: Path) -> None:
        self.checkpoint, self.sizes, self.folder = checkpoint, sizes, folder
        self.parity = Parity()
        encoder = PromptEncoder(checkpoint.tokenizer, sizes)
        self.prompts = [encoder.encode(prompt) for prompt in PROMPTS]
        self.pixels = _pictures(len(PROMPTS), sizes)
        self.features: NDArray[np.float32] | None = None

    def vision(self) -> None:
        graph = session(self.folder / "vision_encoder.onnx")
        self.features = reference_features(self.checkpoint, self.pixels)
        exported = [graph.run(None, {"pixels": picture[None]})[0][0] for picture in self.pixels]
        self._note("vision_encoder", np.stack(exported), self.features)

    def text(self) -> None:
        runner = GraphRunner(self.folder)
        hidden, mask = self._encoder(runner)
        self._decoder(runner, hidden, mask)
        self._generations(runner)

    @torch.inference_mode()
    def _encoder(self, runner: GraphRunner) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.features is not None
        self.caches = runner.encode(self.features, self.prompts, num_beams=2)
        mask = torch.tensor(self.caches.encoder_attention_mask)
        hidden = reference_hidden(self.checkpoint.model, self.features, self.prompts, mask)
        expected, exported = [], []
        for index, layer in enumerate(self.checkpoint.model.model.language_model.decoder.layers):
            for part, projection in (
                ("key", layer.encoder_attn.k_proj),
                ("value", layer.encoder_attn.v_proj),
            ):
                cache = self.caches.cross[f"past_key_values.{index}.encoder.{part}"]
                # What stands on padding is never read.
                exported.append(cache.transpose(0, 2, 1, 3).reshape(hidden.shape)[mask.numpy() != 0])
                expected.append(projection(hidden)[mask != 0].numpy())
        self._note("encoder", np.stack(exported), np.stack(expected))
        return hidden, mask

    @torch.inference_mode()
    def _decoder(self, runner: GraphRunner, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        """Two random continuations per request, step by step with caches that change rows, against a pass over each."""
        requests, beams, steps = len(PROMPTS), 2, 6
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.sizes.vocab_size, (requests, beams, steps))
        swap = np.arange(requests * beams).reshape(requests, beams)[:, ::-1].reshape(-1)
        for step in range(steps):
            # The beams of a request change places at every step, and so do their tokens.
            tokens[:, :, :step] = tokens[:, ::-1, :step]
            positions = np.full((requests, beams), step)
            found, logprobs = runner.decode(
                self.caches, tokens[:, :, step], positions, swap, [np.zeros(0, np.int64)] * requests * beams
            )
            expected = self._reference_logprobs(tokens[:, :, : step + 1], hidden, mask)
            self._note("decoder", logprobs, np.take_along_axis(expected, found, axis=2))

    def _reference_logprobs(self, tokens: NDArray[np.int64], hidden: torch.Tensor, mask: torch.Tensor) -> NDArray[Any]:
        requests, beams, steps = tokens.shape
        output = self.checkpoint.model(
            encoder_outputs=BaseModelOutput(hidden.repeat_interleave(beams, dim=0)),
            attention_mask=mask.repeat_interleave(beams, dim=0),
            decoder_input_ids=torch.tensor(tokens.reshape(-1, steps)),
        )
        return output.logits[:, -1].log_softmax(dim=-1).reshape(requests, beams, -1).numpy()

    def _generations(self, runner: GraphRunner) -> None:
        assert self.features is not None
        settings = GenerationSettings.from_config(self.checkpoint.generation, self.sizes.max_position_embeddings)
        for features, prompt in zip(self.features, self.prompts, strict=True):
            for num_beams in (1, 3):
                asked: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": NEW_TOKENS}
                expected = reference_generate(self.checkpoint.model, features, prompt, **asked)
                found = generate(runner, features, prompt, settings.override(**asked))
                self.parity.generations += 1
                self.parity.generations_equal += found.token_ids.tolist() == expected.sequences[0].tolist()

    def _note(self, graph: str, exported: NDArray[Any], expected: NDArray[Any]) -> None:
        absolute = float(np.abs(exported - expected).max())
        found = {"absolute": absolute, "relative": absolute / float(np.abs(expected).max())}
        before = self.parity.graphs.get(graph, found)
        # NaN must not be lost to a comparison.
        self.parity.graphs[graph] = {name: float(np.maximum(found[name], before[name])) for name in found}


@torch.inference_mode()
def reference_features(checkpoint: Checkpoint, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """u8 [B, H, W, 3] -> [B, N, D] as HF's image processor and model make them, one picture at a time."""
    settings = checkpoint.preprocessor
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    values = torch.tensor(pixels).permute(0, 3, 1, 2).float() * settings["rescale_factor"]
    values = (values - mean) / std
    model = checkpoint.model
    return np.concatenate([model.get_image_features(picture[None]).pooler_output.numpy() for picture in values])


@torch.inference_mode()
def reference_hidden(
    model: Any, features: NDArray[np.float32], prompts: list[NDArray[np.int64]], mask: torch.Tensor
) -> torch.Tensor:
    """Image features [B, N, D], one prompt per row and the mask [B, N + S] -> the encoder's last hidden state."""
    length = mask.shape[1] - features.shape[1]
    padded = np.zeros((len(prompts), length), np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    embedded = torch.cat([torch.tensor(features), model.get_input_embeddings()(torch.tensor(padded))], dim=1)
    return model.model.language_model.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state


@torch.inference_mode()
def reference_generate(model: Any, features: NDArray[np.float32], prompt: NDArray[np.int64], **settings: Any) -> Any:
    """Image features [N, D] and prompt ids [S] -> transformers' `generate`, with scores, for settings of its own."""
    mask = torch.ones(1, len(features) + len(prompt), dtype=torch.int64)
    hidden = reference_hidden(model, features[None], [prompt], mask)
    return model.generate(
        encoder_outputs=BaseModelOutput(hidden),
        attention_mask=mask,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )


def _pictures(count: int, sizes: Sizes) -> NDArray[np.uint8]:
    """Coloured gradients with rectangles: edges and flat areas, the same at every run."""
    rng = np.random.default_rng(0)
    height, width = sizes.image_height, sizes.image_width
    ramps = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    pictures = []
    for _ in range(count):
        picture = 255 * (ramps[0] * rng.random(3) + ramps[1] * rng.random(3)) / 2
        for _ in range(6):
            top, left = rng.integers(0, height * 3 // 4), rng.integers(0, width * 3 // 4)
            picture[top : top + rng.integers(4, height // 2), left : left + rng.integers(4, width // 2)] = (
                255 * rng.random(3)
            )
        pictures.append(picture.astype(np.uint8))
    return np.stack(pictures)
