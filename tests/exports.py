"""An export without a model: its settings are whole, its graphs are their own names."""

import json
from pathlib import Path
from typing import Any

from florence2_release.version_files import FILES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from florence2.manifest import Manifest, ModelSettings, Sizes, sha256_of

SIZES = Sizes(
    image_height=64,
    image_width=64,
    image_tokens=17,
    d_model=8,
    vocab_size=10,
    decoder_layers=1,
    decoder_attention_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    location_bins=2,
)
GENERATION = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "num_beams": 3,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "length_penalty": 1.0,
}
PREPROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
    "image_seq_length": 17,
}
PADDING = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
"""Of a tokenizer.json: a prompt of gigabytes."""


def tokenizer() -> Tokenizer:
    """Ten tokens."""
    special = ["<s>", "<pad>", "</s>", "<loc_0>", "<loc_1>"]
    made = Tokenizer(models.BPE({word: index for index, word in enumerate([*special, *"abcde"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made


def write(folder: Path) -> Path:
    folder.mkdir()
    names = sorted({name for files in FILES.values() for name in files} - {ModelSettings.FILE_NAME})
    for name in names:
        (folder / name).write_text(name)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tokenizer().save(str(folder / "tokenizer.json"))
    Manifest(
        source="somewhere",
        revision=None,
        sha256="0",
        layout="native",
        repairs=[],
        precision="fp32",
        opset=20,
        sizes=SIZES,
        banned_grounding_phrases=[],
        tools={},
        files={name: sha256_of(folder / name) for name in names},
    ).write(folder)
    return folder


def sign(folder: Path) -> None:
    """The manifest names the files as they are now, as whoever changed them would have it."""
    content = json.loads((folder / "manifest.json").read_text())
    content["files"] = {name: sha256_of(folder / name) for name in content["files"]}
    (folder / "manifest.json").write_text(json.dumps(content))
