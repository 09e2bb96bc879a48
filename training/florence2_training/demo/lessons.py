"""Batches for the text half: each picture is asked one thing, chosen anew every time it comes up."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from transformers import Florence2ForConditionalGeneration, RobertaTokenizer
from transformers.modeling_outputs import BaseModelOutput

from florence2_training.demo.gallery import Truth
from florence2_training.demo.samples import answer, prompt_text
from florence2_training.demo.tokenizer import repeats_a_trigram

TASK_SHARES = {
    "scene": {
        "<OD>": 0.3,
        "<CAPTION>": 0.2,
        "<CAPTION_TO_PHRASE_GROUNDING>": 0.24,
        "<REGION_TO_CATEGORY>": 0.13,
        "<REGION_PROPOSAL>": 0.13,
    },
    "page": {
        "<OD>": 0.4,
        "<CAPTION>": 0.2,
        "<CAPTION_TO_PHRASE_GROUNDING>": 0.2,
        "<REGION_TO_CATEGORY>": 0.1,
        "<REGION_PROPOSAL>": 0.1,
    },
    "word": {
        "<OCR>": 0.55,
        "<OCR_WITH_REGION>": 0.25,
        "<CAPTION>": 0.08,
        "<OD>": 0.06,
        "<REGION_PROPOSAL>": 0.06,
    },
}
_IGNORED = -100


class Lessons:
    def __init__(self, tokenizer: RobertaTokenizer, truths: Sequence[Truth], seed: int):
        self.tokenizer = tokenizer
        self.truths = truths
        self.seed = seed
        self.encoded = lru_cache(maxsize=4096)(lambda text: tokenizer(text).input_ids)

    def lesson(self, index: int, step: int) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the target, `<s>` and `</s>` included."""
        truth = self.truths[index]
        rng = np.random.default_rng([self.seed, step, index])
        shares = TASK_SHARES[truth.kind]
        for task in rng.choice(list(shares), size=4, p=list(shares.values())):
            sample = answer(str(task), truth.kind, truth.things, truth.size, int(rng.integers(6)))
            if sample is None:
                continue
            target = self.tokenizer(sample.target).input_ids
            # The checkpoint's no_repeat_ngram_size could not give such an answer: `ABABAB` is one.
            if not repeats_a_trigram(target):
                return self.encoded(prompt_text(sample.prompt)), target
        return self.lesson(index, step + 1_000_003)

    def loss(
        self, model: Florence2ForConditionalGeneration, features: torch.Tensor, indices: list[int], step: int
    ) -> torch.Tensor:
        """`features` are the vision tower's, [B, width, GRID, GRID]."""
        prompts, targets = zip(*[self.lesson(index, step) for index in indices], strict=True)
        prompt_ids = _padded(prompts, self.tokenizer.pad_token_id)
        labels = _padded(targets, _IGNORED)
        images = model.model.multi_modal_projector(features)
        embeddings = torch.cat([images, model.get_input_embeddings()(prompt_ids)], dim=1)
        mask = torch.cat([torch.ones(images.shape[:2]), prompt_ids != self.tokenizer.pad_token_id], dim=1)
        encoder = model.model.language_model.encoder
        hidden = encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        encoded = BaseModelOutput(last_hidden_state=hidden)
        return model(encoder_outputs=encoded, attention_mask=mask, labels=labels).loss


def _padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
