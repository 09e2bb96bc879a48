"""A checkpoint's weights in transformers' native class."""

import torch
from torch import Tensor, nn
from transformers import Florence2Config, Florence2ForConditionalGeneration

from florence2_export.layouts import (
    EMBEDDING_COPIES,
    LM_HEAD,
    LOGITS_BIAS,
    SHARED,
    TEMPORAL,
    name_in,
)
from florence2_export.source import CheckpointError, one_line
from florence2_export.weights import Weights


def native_model(
    config: Florence2Config, weights: Weights, declared_tied: bool | None, repairs: list[str]
) -> Florence2ForConditionalGeneration:
    """The native class with the checkpoint's tensors: on the CPU, float32, for inference.

    `declared_tied` is what config.json says of the head; the tensors decide. On the meta device first:
    the weights are then held once.
    """
    head_is_own = _head_is_own(weights, declared_tied, repairs)
    config.tie_word_embeddings = not head_is_own
    try:
        with torch.device("meta"):
            model = Florence2ForConditionalGeneration(config)
    except Exception as error:  # its modules raise what they like
        raise CheckpointError(
            f"config.json: no such Florence-2 can be built ({one_line(error)}); correct it"
        ) from error
    model.load_state_dict(_state(model, weights, head_is_own), assign=True)
    _tie(model, head_is_own)
    return model.eval().requires_grad_(False)


def _state(model: Florence2ForConditionalGeneration, weights: Weights, head_is_own: bool) -> dict[str, Tensor]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = _table(weights)
    state = {}
    for name, shape in wanted.items():
        source = table if name in (SHARED, *EMBEDDING_COPIES) or (name == LM_HEAD and not head_is_own) else name
        if source == table and name != SHARED:
            continue
        if name == TEMPORAL and not weights.has(name):
            state[name] = _temporal_embedding(model)
            continue
        if not weights.has(source):
            raise weights.missing(source)
        if weights.shape(source) != shape:
            raise weights.wrong_shape(source, shape)
        state[name] = weights.read(source)
    for name in (SHARED, *EMBEDDING_COPIES, *([] if head_is_own else [LM_HEAD])):
        _check_copy(weights, name, table)
        state[name] = state[SHARED]
    for original in LOGITS_BIAS:
        weights.ignore_zeros(original)
    weights.refuse_unread()
    return state


def _table(weights: Weights) -> str:
    """One name of the tied embedding; safetensors keeps only one of them, not always `shared`."""
    return next((name for name in (SHARED, *EMBEDDING_COPIES, LM_HEAD) if weights.has(name)), SHARED)


def _check_copy(weights: Weights, name: str, table: str) -> None:
    if name == table or not weights.has(name):
        return
    if weights.shape(name) != weights.shape(table):
        raise weights.wrong_shape(name, weights.shape(table))
    if not torch.equal(weights.read(name), weights.read(table)):
        entry, original = weights.entries[name_in(weights.layout, name)], name_in(weights.layout, name)
        raise CheckpointError(
            f"{entry.file}: {original} differs from {name_in(weights.layout, table)}, but they are one; "
            "save the model with its embeddings tied"
        )


def _head_is_own(weights: Weights, declared_tied: bool | None, repairs: list[str]) -> bool:
    """Whether lm_head holds other values than the embedding, as a LoRA merged into a tied head leaves it."""
    table = _table(weights)
    if not weights.has(LM_HEAD):
        if declared_tied is False:
            raise weights.missing(LM_HEAD)
        return False
    if table == LM_HEAD:
        if declared_tied is False:
            raise weights.missing(SHARED)
        return False
    if weights.shape(LM_HEAD) == weights.shape(table) and torch.equal(weights.read(LM_HEAD), weights.read(table)):
        return False
    if declared_tied is not False:
        head = name_in(weights.layout, LM_HEAD)
        repairs.append(f"config.json: tie_word_embeddings set to false, because {head} differs from the embedding")
    return True


def _temporal_embedding(model: Florence2ForConditionalGeneration) -> Tensor:
    on_meta: nn.Module = model.model.multi_modal_projector.visual_temporal_embed
    return type(on_meta)(model.config).get_buffer("pos_idx_to_embed")


def _tie(model: Florence2ForConditionalGeneration, head_is_own: bool) -> None:
    # By hand: load_state_dict(assign=True) makes a parameter of each name, and which of them tie_weights()
    # joins depends on the version of transformers.
    language = model.model.language_model
    language.encoder.embed_tokens.weight = language.shared.weight
    language.decoder.embed_tokens.weight = language.shared.weight
    if not head_is_own:
        model.lm_head.weight = language.shared.weight
