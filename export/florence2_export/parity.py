"""The exported graphs against the checkpoint, in numbers: each graph by itself, then whole generations.

The reference is transformers' own code, never the modules the graphs were made from.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutput

from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Sizes
from florence2.prompts import PromptEncoder
from florence2_export.checkpoint import Checkpoint
from florence2_export.tolerance import TOLERANCE

AGREEMENT = {"fp32": 0.9, "fp16": 0.5, "int8": 0.0}
"""Share of whole generations that must have the checkpoint's token ids. Less than one: a near tie between two tokens
may fall either way when sums are rounded in another order, and more often in fp16. int8 gives answers of its own:
`florence2 eval` says whether they are good enough."""

PROMPTS = ("<OD>", "<CAPTION>", "<CAPTION_TO_PHRASE_GROUNDING>a green car")
NUM_BEAMS = (1, 3)
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
        self.pixels = example_pictures(len(PROMPTS), sizes)
        self.features: NDArray[np.float32] | None = None

    def vision(self) -> None:
        graph = session(self.folder / "vision_encoder.onnx")
        self.features = reference_features(self.checkpoint, self.pixels)
        exported = [graph.run(None, {"pixels": picture[None]})[0][0] for picture in self.pixels]
        self._note("vision_encoder", np.stack(exported), self.features)

    def text(self) -> None:
        caches = CacheSizes.of(self.sizes, rows=2 * len(PROMPTS) * max(NUM_BEAMS), length=NEW_TOKENS + 1)
        runner = GraphRunner(self.folder, caches)
        hidden, mask = self._encoder(runner)
        self._decoder(runner, hidden, mask)
        self._generations(runner)

    @torch.inference_mode()
    def _encoder(self, runner: GraphRunner) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.features is not None
        settings = self._settings().override(num_beams=2)
        self.requests = [
            Request(features, prompt, settings, respond=lambda _: None)
            for features, prompt in zip(self.features, self.prompts, strict=True)
        ]
        lengths = torch.tensor([request.encoder_length for request in self.requests])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(torch.int64)
        hidden = reference_hidden(self.checkpoint.model, self.features, self.prompts, mask)
        runner.encode(self.requests)
        for request, expected in zip(self.requests, hidden, strict=True):
            caches = runner.cross_attention(request)
            for index, layer in enumerate(self.checkpoint.model.model.language_model.decoder.layers):
                for part, projection in (("key", layer.encoder_attn.k_proj), ("value", layer.encoder_attn.v_proj)):
                    found = caches[f"past_key_values.{index}.encoder.{part}"].transpose(1, 0, 2)
                    self._note("encoder", found.reshape(len(found), -1), projection(expected[: len(found)]).numpy())
        return hidden, mask

    @torch.inference_mode()
    def _decoder(self, runner: GraphRunner, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        """Two random continuations per request, step by step, beams changing places, against a pass over each."""
        requests, beams, steps = len(PROMPTS), 2, 6
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.sizes.vocab_size, (requests, beams, steps))
        for step in range(steps):
            # The beams of a request change places at every step, and so do their tokens.
            tokens[:, :, :step] = tokens[:, ::-1, :step]
            so_far = tokens[:, :, : step + 1]
            ((found, logprobs),) = runner.decode([cast(Any, _Forced(self.requests, so_far))])
            expected = self._reference_logprobs(so_far, hidden, mask)
            self._note("decoder", logprobs, np.take_along_axis(expected, found, axis=2))
        for request in self.requests:
            runner.release(request)

    def _reference_logprobs(self, tokens: NDArray[np.int64], hidden: torch.Tensor, mask: torch.Tensor) -> NDArray[Any]:
        requests, beams, steps = tokens.shape
        output = self.checkpoint.model(
            encoder_outputs=BaseModelOutput(hidden.repeat_interleave(beams, dim=0)),
            attention_mask=mask.repeat_interleave(beams, dim=0),
            decoder_input_ids=torch.tensor(tokens.reshape(-1, steps)),
        )
        return output.logits[:, -1].log_softmax(dim=-1).reshape(requests, beams, -1).numpy()

    def _generations(self, runner: GraphRunner) -> None:
        """All at once, as they are served."""
        assert self.features is not None
        engine = Engine(runner, Scheduler(runner.caches, max_waiting=len(PROMPTS) * len(NUM_BEAMS), encoder_batch=2))
        expected: list[list[int]] = []
        found: dict[int, Generation | Exception] = {}
        for features, prompt in zip(self.features, self.prompts, strict=True):
            for num_beams in NUM_BEAMS:
                asked: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": NEW_TOKENS}
                respond = partial(found.__setitem__, len(expected))
                engine.submit(Request(features, prompt, self._settings().override(**asked), respond))
                reference = reference_generate(self.checkpoint.model, features, prompt, **asked)
                expected.append(reference.sequences[0].tolist())
        engine.finish()
        for index, reference in enumerate(expected):
            answer = found[index]
            if isinstance(answer, Exception):
                raise answer
            self.parity.generations += 1
            self.parity.generations_equal += answer.token_ids.tolist() == reference

    def _settings(self) -> GenerationSettings:
        return GenerationSettings.from_config(self.checkpoint.generation, self.sizes.max_position_embeddings)

    def _note(self, graph: str, exported: NDArray[Any], expected: NDArray[Any]) -> None:
        absolute = float(np.abs(exported - expected).max())
        found = {"absolute": absolute, "relative": absolute / float(np.abs(expected).max())}
        before = self.parity.graphs.get(graph, found)
        # NaN must not be lost to a comparison.
        self.parity.graphs[graph] = {name: float(np.maximum(found[name], before[name])) for name in found}


class _Forced:
    """Searches whose tokens, [N, K, length], are given, and whose beams change places at every step."""

    def __init__(self, requests: list[Request], tokens: NDArray[np.int64]) -> None:
        count, self.num_beams, length = tokens.shape
        self.requests, self.input_ids = requests, tokens[:, :, -1]
        self.lengths = np.full(count, length)
        self.beam_indices = np.tile(np.arange(self.num_beams)[::-1], (count, 1))

    def banned_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)


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


def example_pictures(count: int, sizes: Sizes) -> NDArray[np.uint8]:
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
