"""A checkpoint in PyTorch answers questions."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from florence2_export.checkpoint import Checkpoint
from florence2_export.export import sizes_of
from florence2_export.pixel_values import normalised
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutput

from florence2.generation.settings import GenerationSettings
from florence2_evaluation.model_io import Asked, Wording
from florence2_evaluation.models import Report, refuse, without_problems
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question


class TorchModel:
    """transformers' `generate` on a loaded checkpoint, whose model may be wrapped by peft, in half precision, or being
    trained: it is put into evaluation while it answers. `num_beams` and `max_new_tokens` left out are the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batch_size: int = 8,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.checkpoint, self.batch_size, self.device = checkpoint, batch_size, torch.device(device)
        self.model = cast(Any, checkpoint.model).to(self.device)
        sizes = sizes_of(checkpoint)
        self.settings = GenerationSettings.from_config(checkpoint.generation, sizes.max_position_embeddings)
        self.settings = self.settings.override(num_beams=num_beams, max_new_tokens=max_new_tokens)
        self.wording = Wording(
            checkpoint.tokenizer, checkpoint.preprocessor, sizes, checkpoint.banned_grounding_phrases
        )

    def predict(self, asked: Iterable[Question], report: Report = refuse) -> Iterator[Prediction]:
        worded = without_problems(map(self.wording.ask, asked), report)
        while batch := list(islice(worded, self.batch_size)):
            with _evaluating(self.model), torch.no_grad():
                answers = self._answer(batch)
            for one, (token_ids, logprobs) in zip(batch, answers, strict=True):
                yield self.wording.prediction(one, token_ids, logprobs)

    def _answer(self, batch: list[Asked]) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        hidden, mask = self._encode(batch)
        sequences = self.model.generate(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, generation_config=self._generation_config()
        )
        answers = []
        for row, sequence in enumerate(sequences):
            own = slice(row, row + 1)
            sequence = sequence[: _length(sequence, self.settings.eos_token_id)]
            answers.append((sequence.cpu().numpy(), self._logprobs(sequence, hidden[own], mask[own])))
        return answers

    def _encode(self, batch: list[Asked]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the encoder's last hidden state [B, N + S, D] and its mask [B, N + S], 0 behind shorter prompts."""
        lengths = torch.tensor([len(asked.input_ids) for asked in batch])
        present = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.zeros(present.shape, dtype=torch.int64)
        input_ids[present] = torch.from_numpy(np.concatenate([asked.input_ids for asked in batch]))
        features = self._features(np.stack([asked.pixels for asked in batch]))
        embedded = self.model.get_input_embeddings()(input_ids.to(self.device))
        mask = torch.cat([torch.ones(features.shape[:2], dtype=torch.int64), present.to(torch.int64)], dim=1)
        mask = mask.to(self.device)
        inputs = torch.cat([features.to(embedded.dtype), embedded], dim=1)
        hidden = self.model.get_encoder()(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        return hidden, mask

    def _features(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """u8 [B, height, width, 3] -> [B, N, D]."""
        values = normalised(torch.from_numpy(pixels).to(self.device), self.checkpoint.preprocessor)
        return self.model.get_image_features(values.to(self.model.dtype)).pooler_output

    def _generation_config(self) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.update(
            num_beams=self.settings.num_beams,
            max_length=self.settings.max_length,
            max_new_tokens=None,
            do_sample=False,
            return_dict_in_generate=False,
        )
        if self.settings.num_beams == 1:
            # They mean nothing then, and generate would warn of it.
            config.update(early_stopping=False, length_penalty=1.0)
        return config

    def _logprobs(self, sequence: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor) -> NDArray[np.float32]:
        """[L - 1], as `florence2.generation` gives them but of forced tokens, which are no locations.

        The whole answer is read once more: what `generate` can keep, all scores of all beams at all steps, takes
        gigabytes for a page of text."""
        logits = self.model(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, decoder_input_ids=sequence[None, :-1]
        ).logits[0]
        return logits.float().log_softmax(dim=-1).gather(1, sequence[1:, None])[:, 0].cpu().numpy()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Parts that were not training before, such as a frozen vision tower, are not put into training after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _length(sequence: torch.Tensor, eos_token_id: int) -> int:
    """Up to the end token; behind it a batch is padded. The decoder start may be the same token."""
    ends = (sequence[1:] == eos_token_id).nonzero()
    return int(ends[0]) + 2 if len(ends) else len(sequence)
