"""Florence-2 as it learns: a batch in, the summed cross-entropy of its answers out."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from florence2_export.pixel_values import normalised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from florence2_training.corpus import Corpus, Tokens
from florence2_training.features import FeatureCache
from florence2_training.pixels import read_pixels
from florence2_training.sampler import Batch
from florence2_training.trainable import trained_parts

IGNORED = -100
"""A label that is no label, as in torch's cross_entropy."""


class Batches:
    """Samples as tensors. `read` is what a DataLoader's workers call."""

    def __init__(
        self, corpora: list[Corpus], tokens: Tokens, preprocessor: dict[str, Any], features: FeatureCache | None = None
    ) -> None:
        self.corpora, self.tokens, self.preprocessor, self.features = corpora, tokens, preprocessor, features
        self.pad = tokens.prompts.tokenizer.get_vocab()["<pad>"]

    def __getitem__(self, batch: Batch) -> dict[str, Any]:
        """`pixels` u8 [P, H, W, 3] or `features` [P, C, h, w], one per picture; `picture_of` [B]; `input_ids` and
        `attention_mask` [B, S]; `labels` [B, T]; `weight`, the tokens that count."""
        chosen = [self._example(sample) for sample in batch.samples]
        names = [str(example.image) for example in chosen]
        pictures = list(dict.fromkeys(names))
        prompts = [self.tokens.prompt(example.prefix) for example in chosen]
        answers = [self.tokens.answer(example.suffix) for example in chosen]
        seen = (
            {"pixels": torch.from_numpy(read_pixels(pictures, self.preprocessor))}
            if self.features is None
            else {"features": self.features.read(pictures)}
        )
        labels = _padded(answers, IGNORED)
        return {
            **seen,
            "picture_of": torch.tensor([pictures.index(name) for name in names]),
            "input_ids": _padded(prompts, self.pad),
            "attention_mask": _padded([[1] * len(prompt) for prompt in prompts], 0),
            "labels": labels if batch.counts else torch.full_like(labels, IGNORED),
            "weight": torch.tensor(float(sum(map(len, answers)) if batch.counts else 0)),
        }

    def _example(self, sample: int) -> Any:
        for corpus in self.corpora:
            if sample < len(corpus):
                return corpus[sample]
            sample -= len(corpus)
        raise IndexError(sample)


class Florence2Learner(nn.Module):
    def __init__(self, model: Any, preprocessor: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.preprocessor = preprocessor
        self.sees_frozen = "vision" not in trained_parts(model)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The sum over all labels. The loss is computed here, not in transformers: before 5.13 it was that of labels
        shifted twice (huggingface/transformers#46897)."""
        core, text = self.model.model, self.model.model.language_model
        images = core.multi_modal_projector(self._seen(batch))[batch["picture_of"]]
        embeddings = torch.cat([images, self.model.get_input_embeddings()(batch["input_ids"]).to(images.dtype)], dim=1)
        mask = torch.cat([batch["attention_mask"].new_ones(images.shape[:2]), batch["attention_mask"]], dim=1)
        encoded = text.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        labels = batch["labels"]
        hidden = text.decoder(
            input_ids=self._shifted(labels),
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        # The head, the widest layer of all, only where there is a label.
        counted = labels != IGNORED
        logits = self.model.lm_head(hidden[counted]).float()
        return F.cross_entropy(logits, labels[counted], reduction="sum")

    def _seen(self, batch: dict[str, Any]) -> Tensor:
        if "features" in batch:
            return batch["features"].to(next(self.model.model.multi_modal_projector.parameters()).dtype)
        with torch.no_grad() if self.sees_frozen else nullcontext():
            return self.model.model.vision_tower(normalised(batch["pixels"], self.preprocessor)).last_hidden_state

    def _shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads to give `labels`: its start, then the labels before."""
        config = self.model.config.text_config
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        before = labels[:, :-1]
        return torch.cat([start, before.masked_fill(before == IGNORED, config.pad_token_id)], dim=1)


def checkpoint_activations(model: Any) -> None:
    """Activations are computed again in the backward pass, in every layer of both towers: transformers leaves DaViT
    out, and layers in evaluation mode, frozen ones that gradients pass through."""
    language = model.model.language_model
    blocks = [block for stage in model.model.vision_tower.blocks for block in stage]
    for layer in (*blocks, *language.encoder.layers, *language.decoder.layers):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.from_numpy(np.array([row + [filler] * (longest - len(row)) for row in rows], np.int64))
