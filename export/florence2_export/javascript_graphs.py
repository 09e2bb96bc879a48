"""The graphs that transformers.js runs, with the names and tensors of onnx-community's Florence-2 files.

In every precision they take and give float32, which is what JavaScript has; so files of different precisions go
together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from florence2.manifest import Sizes
from florence2_export.graphs import Graph
from florence2_export.layers import dtype_of, learned_positions, mask_bias, softmax_attention, split_heads
from florence2_export.text_graphs import encode
from florence2_export.vision_graph import ImageEncoder


class TokenEmbedding(nn.Module):
    """`input_ids` i64 [B, S] -> `inputs_embeds` f32 [B, S, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.model.language_model.encoder.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids).float()


class QuantizedEmbedding(nn.Module):
    """The same from 8-bit rows with a scale each. ONNX Runtime's quantizer gives the table one scale, which a few long
    rows make coarse for all others: the demo checkpoint's logits drift four times as far."""

    scales: Tensor
    rows: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        table = model.model.language_model.encoder.embed_tokens.weight.detach()
        scales = table.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("rows", (table / scales).round().to(torch.int8))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows[input_ids] * self.scales[input_ids]


class TextEncoder(nn.Module):
    """`attention_mask` i64 [B, S], `inputs_embeds` f32 [B, S, D], image features in front -> `last_hidden_state`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.language_model.encoder

    def forward(self, attention_mask: Tensor, inputs_embeds: Tensor) -> Tensor:
        return encode(self.encoder, inputs_embeds.to(dtype_of(self)), attention_mask).float()


class CachedDecoder(nn.Module):
    """The first step and all others in one graph, without the usual branch: at first the caches have length 0.

    `encoder_attention_mask` i64 [B, S], `encoder_hidden_states` f32 [B, S, D], `inputs_embeds` f32 [B, T, D]; per layer
    the past's decoder.key, decoder.value [B, heads, P, head_dim], encoder.key, encoder.value [B, heads, E, head_dim];
    `use_cache_branch` bool [1], which readers of this layout feed, is not looked at.
    -> `logits` f32 [B, T, V]; per layer what is the past of the next step: decoder [B, heads, P + T, head_dim], and the
    keys and values of the encoder states from E on. transformers.js keeps those of the first step; then they are empty,
    which spares every later step a copy.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.model.language_model.decoder
        self.lm_head = model.lm_head

    def forward(
        self,
        encoder_attention_mask: Tensor,
        encoder_hidden_states: Tensor,
        inputs_embeds: Tensor,
        past: list[Tensor],
        use_cache_branch: Tensor,
    ) -> list[Tensor]:
        decoder: Any = self.decoder
        past = [cache.to(dtype_of(self)) for cache in past]
        past_length, length = past[0].shape[2], inputs_embeds.shape[1]
        fresh = encoder_hidden_states[:, past[2].shape[2] :].to(dtype_of(self))
        positions = past_length + torch.arange(length)
        hidden = decoder.layernorm_embedding(inputs_embeds.to(dtype_of(self)) + learned_positions(decoder, positions))
        self_bias = mask_bias(torch.arange(past_length + length) <= positions[:, None], hidden.dtype)
        cross_bias = mask_bias(encoder_attention_mask[:, None, None, :] > 0, hidden.dtype)
        present = []
        for i, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            query, *new = (
                split_heads(projection(hidden), attention.num_heads)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            key, value = (torch.cat(pair, dim=2) for pair in zip(past[4 * i : 4 * i + 2], new, strict=True))
            present += [key, value]
            attended = softmax_attention(query * attention.scaling, key, value, self_bias)
            hidden = layer.self_attn_layer_norm(hidden + attention.out_proj(attended))
            attention = layer.encoder_attn
            query = split_heads(attention.q_proj(hidden), attention.num_heads)
            projections = (attention.k_proj, attention.v_proj)
            new = [split_heads(projection(fresh), attention.num_heads) for projection in projections]
            key, value = (torch.cat(pair, dim=2) for pair in zip(past[4 * i + 2 : 4 * i + 4], new, strict=True))
            present += new
            attended = softmax_attention(query * attention.scaling, key, value, cross_bias)
            hidden = layer.encoder_attn_layer_norm(hidden + attention.out_proj(attended))
            hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        return [output.float() for output in (self.lm_head(hidden), *present)]


def _cache_names(sizes: Sizes, direction: str) -> list[str]:
    kinds = [f"{stack}.{part}" for stack in ("decoder", "encoder") for part in ("key", "value")]
    return [f"{direction}.{layer}.{kind}" for layer in range(sizes.decoder_layers) for kind in kinds]


def _decoder_example(sizes: Sizes, _: torch.dtype) -> tuple:
    batch, encoder_length, past_length = 2, 7, 4
    lengths = (past_length, past_length, encoder_length - 2, encoder_length - 2) * sizes.decoder_layers
    return (
        torch.ones(batch, encoder_length, dtype=torch.int64),
        torch.zeros(batch, encoder_length, sizes.d_model),
        torch.zeros(batch, 3, sizes.d_model),
        [torch.zeros(batch, sizes.decoder_attention_heads, length, sizes.head_dim) for length in lengths],
        torch.zeros(1, dtype=torch.bool),
    )


def _decoder_shapes(sizes: Sizes) -> tuple:
    # transformers.js makes the first caches of these: `batch_size` by its name, every other symbol is 0.
    batch, encoder_length = Dim("batch_size"), Dim("encoder_sequence_length")
    own = {0: batch, 2: Dim("past_decoder_sequence_length")}
    cross = {0: batch, 2: Dim("past_encoder_sequence_length")}
    return (
        {0: batch, 1: encoder_length},
        {0: batch, 1: encoder_length},
        {0: batch, 1: Dim("decoder_sequence_length")},
        [own, own, cross, cross] * sizes.decoder_layers,
        None,
    )


VISION_ENCODER = Graph(
    name="vision_encoder",
    build=lambda model, _: ImageEncoder(model),
    example=lambda s, _: (torch.zeros(2, 3, s.image_height, s.image_width),),
    dynamic_shapes=lambda s: ({0: Dim("batch_size")},),
    input_names=lambda s: ["pixel_values"],
    output_names=lambda s: ["image_features"],
    one_picture=True,
)
EMBED_TOKENS = Graph(
    name="embed_tokens",
    build=lambda model, _: TokenEmbedding(model),
    example=lambda s, _: (torch.ones(2, 8, dtype=torch.int64),),
    dynamic_shapes=lambda s: ({0: Dim("batch_size"), 1: Dim("sequence_length")},),
    input_names=lambda s: ["input_ids"],
    output_names=lambda s: ["inputs_embeds"],
)
ENCODER_MODEL = Graph(
    name="encoder_model",
    build=lambda model, _: TextEncoder(model),
    example=lambda s, _: (torch.ones(2, 8, dtype=torch.int64), torch.zeros(2, 8, s.d_model)),
    dynamic_shapes=lambda s: ({0: Dim("batch_size"), 1: Dim("encoder_sequence_length")},) * 2,
    input_names=lambda s: ["attention_mask", "inputs_embeds"],
    output_names=lambda s: ["last_hidden_state"],
)
DECODER_MODEL_MERGED = Graph(
    name="decoder_model_merged",
    build=lambda model, _: CachedDecoder(model),
    example=_decoder_example,
    dynamic_shapes=_decoder_shapes,
    input_names=lambda s: [
        *("encoder_attention_mask", "encoder_hidden_states", "inputs_embeds"),
        *_cache_names(s, "past_key_values"),
        "use_cache_branch",
    ],
    output_names=lambda s: ["logits", *_cache_names(s, "present")],
)
GRAPHS = (VISION_ENCODER, EMBED_TOKENS, ENCODER_MODEL, DECODER_MODEL_MERGED)
