"""The torch modules that become the encoder's and the decoder's graphs: transformers' layers, run in the order of its
code."""

from typing import Any

import torch
from torch import Tensor, nn

from florence2_export.layers import dtype_of, learned_positions, mask_bias, softmax_attention, split_heads

CANDIDATES = 16
"""Continuations the decoder returns per beam: beam search looks at 2 x num_beams of them (HF's `beams_to_keep` with one
end token), and num_beams goes up to 8. All of them can stem from one beam, so every beam gives that many."""


class Encoder(nn.Module):
    """Image features and prompt -> the keys and values that every decoder layer attends to.

    `image_features` f32 [B, N, D], `input_ids` i64 [B, S], `attention_mask` i64 [B, S] (0 on padding) ->
    per decoder layer key and value [B, heads, N + S, head_dim], `encoder_attention_mask` i64 [B, N + S].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        language_model = model.model.language_model
        self.encoder = language_model.encoder
        self.cross = nn.ModuleList(layer.encoder_attn for layer in language_model.decoder.layers)

    def forward(self, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        encoder: Any = self.encoder
        image_mask = attention_mask.new_ones(image_features.shape[:2])
        mask = torch.cat([image_mask, attention_mask], dim=1)
        embedded = torch.cat([image_features.to(dtype_of(self)), encoder.embed_tokens(input_ids)], dim=1)
        hidden = encode(encoder, embedded, mask)
        caches = []
        cross: Any = self.cross
        for attention in cross:
            caches.append(split_heads(attention.k_proj(hidden), attention.num_heads))
            caches.append(split_heads(attention.v_proj(hidden), attention.num_heads))
        return [*caches, mask]


def encode(encoder: Any, embedded: Tensor, mask: Tensor) -> Tensor:
    """The text encoder: `embedded` [B, S, D], `mask` i64 [B, S] -> its last hidden state [B, S, D]."""
    # Padding may reach past the last position.
    positions = torch.arange(embedded.shape[1]).clamp(max=encoder.config.max_position_embeddings - 1)
    hidden = encoder.layernorm_embedding(embedded + learned_positions(encoder, positions))
    bias = mask_bias(mask[:, None, None, :] > 0, hidden.dtype)
    for layer in encoder.layers:
        attention = layer.self_attn
        query, key, value = (
            split_heads(projection(hidden), attention.num_heads)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = attention.out_proj(softmax_attention(query * attention.scaling, key, value, bias))
        hidden = layer.self_attn_layer_norm(hidden + attended)
        hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        if hidden.dtype == torch.float16:
            # BartEncoderLayer does so where anything in the batch has overflowed; here it is nobody else's business.
            most = torch.finfo(hidden.dtype).max - 1000
            hidden = hidden.clamp(-most, most)
    return hidden


class Decoder(nn.Module):
    """One step of every beam of every running request: R rows, one per beam, in B slots, one per request.

    `input_ids` i64 [R]: the last token of each beam. `positions` i64 [R]: how many tokens stand before it, which is the
    cache column too that its key and value are written to. `banned_token_ids` i64 [R, M]: tokens that may not come
    next, -1 pads.
    `moved_from`, `moved_to` i64 [N, 2]: cache entries, as row and column, that are copied before anything is read, all
    at once: so beams change rows without their caches being copied whole.
    `beam_rows` i64 [B, K]: the rows of each slot's request, any row where it has fewer beams or the slot is empty;
    `row_beams` i64 [R]: each row's place in it, counted through. `encoder_attention_mask` i64 [B, S].
    Self-attention caches [R, heads, T, head_dim], of which a row's first `positions` columns are read; cross-attention
    caches [B, heads, S, head_dim], once per request: its beams are the query length of cross-attention.
    -> `candidate_ids` i64 and `candidate_logprobs` f32 [R, CANDIDATES], best first; the self-attention caches, changed.
    Bound to the same memory as input and output they are changed in place (ScatterND copies only what it must).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.model.language_model.decoder
        self.lm_head = model.lm_head
        self.candidates = min(CANDIDATES, model.lm_head.out_features)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        banned_token_ids: Tensor,
        moved_from: Tensor,
        moved_to: Tensor,
        beam_rows: Tensor,
        row_beams: Tensor,
        encoder_attention_mask: Tensor,
        past: list[Tensor],
        cross: list[Tensor],
    ) -> list[Tensor]:
        decoder, (slots, beams) = self.decoder, beam_rows.shape
        rows, heads = torch.arange(input_ids.shape[0]), torch.arange(past[0].shape[1])
        moved = (moved_from[:, :1], heads, moved_from[:, 1:])
        changed = torch.cat([moved_to, torch.stack([rows, positions], dim=1)])
        written = (changed[:, :1], heads, changed[:, 1:])
        hidden = decoder.layernorm_embedding(decoder.embed_tokens(input_ids) + learned_positions(decoder, positions))
        self_bias = mask_bias(torch.arange(past[0].shape[2]) <= positions[:, None, None, None], hidden.dtype)
        cross_bias = mask_bias(encoder_attention_mask[:, None, None, :] > 0, hidden.dtype)
        present = []
        for i, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            query, *new = (
                projection(hidden).unflatten(-1, (attention.num_heads, -1))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            key, value = (
                cache.index_put(written, torch.cat([cache[moved], entry]))
                for cache, entry in zip(past[2 * i : 2 * i + 2], new, strict=True)
            )
            present += [key, value]
            attended = softmax_attention(query[:, :, None] * attention.scaling, key, value, self_bias)[:, 0]
            hidden = layer.self_attn_layer_norm(hidden + attention.out_proj(attended))
            attention = layer.encoder_attn
            query = attention.q_proj(hidden)[beam_rows.reshape(-1)].reshape(slots, beams, -1)
            query = split_heads(query, attention.num_heads) * attention.scaling
            attended = softmax_attention(query, cross[2 * i], cross[2 * i + 1], cross_bias).flatten(0, 1)[row_beams]
            hidden = layer.encoder_attn_layer_norm(hidden + attention.out_proj(attended))
            hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        logprobs = torch.log_softmax(self.lm_head(hidden).float(), dim=-1)
        bans = torch.where(banned_token_ids < 0, 0.0, -torch.inf)
        logprobs = logprobs.scatter_add(-1, banned_token_ids.clamp(min=0), bans)
        best = logprobs.topk(self.candidates, dim=-1)
        return [best.indices, best.values, *present]


class Relayout(nn.Module):
    """Rows and columns of a cache: `cache` [R, heads, T, head_dim], `rows` i64 [K], `columns` i64 [C] -> `relaid` [K,
    heads, C, head_dim]. No weights; a graph because the caches lie on the device, where ONNX Runtime is all there is.
    """

    def forward(self, cache: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return cache[rows][:, :, columns]
