"""A tokenizer.json, read only if it is put together as Florence-2's is: BART's byte-level BPE.

Others can hold patterns of their own, and tokenizers matches those by backtracking: `(a+)+$` on forty letters ends in a
panic, which no `except Exception` catches; a Replace that makes a hundred thousand letters of one takes all memory.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from florence2.fields import TOKEN, Choice, Items, Object, Rule, Text, check, short, value_at
from florence2.manifest import read_json

MEGABYTES = 16
"""BART's tokenizer.json has 3.6."""
_NESTED = 16

# Types by the place in the file. What transformers and this package write is ByteLevel and RobertaProcessing or
# TemplateProcessing, without a normalizer; the others are without patterns too.
_TYPES: dict[str, tuple[str | None, ...]] = {
    "model": ("BPE", None),
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"),
    "pre_tokenizer": ("ByteLevel", "Whitespace", "WhitespaceSplit", "Digits", "Punctuation"),
    "post_processor": ("RobertaProcessing", "BertProcessing", "TemplateProcessing", "ByteLevel"),
    "decoder": ("ByteLevel", "Fuse"),
}
_MEMBERS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}

_RULES: dict[str, Rule] = {
    "model": Object(),
    # Left-out merges would make answers of chance; a prefix that isn't in the vocabulary is a panic.
    "model.dropout": Choice((0, 0.0)),
    "model.unk_token": Text(),
    **dict.fromkeys(("model.continuing_subword_prefix", "model.end_of_word_suffix"), Choice(("",))),
    "added_tokens": Items(Object(), 0, 10**5),
}


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError, in one line that names the file and what in it is wrong."""
    content = read_json(path, MEGABYTES)
    _check(content, f"{path}: ")
    with without_panics(path):
        tokenizer = Tokenizer.from_file(str(path))
        made = json.loads(tokenizer.to_str())
    # Where a key comes twice, tokenizers may have taken the other one.
    _check(made, f"{path}: ")
    return tokenizer


def _check(content: Mapping[str, Any], where: str) -> None:
    check(content, _RULES, where, required=("model",))
    for part in _TYPES:
        _check_part(content.get(part), part, f"{where}{part}")
    vocab, unknown = content["model"].get("vocab"), content["model"].get("unk_token")
    check_vocabulary(vocab, f"{where}model.vocab")
    if unknown is not None and unknown not in vocab:
        raise ValueError(f"{where}model.unk_token is {short(unknown)}, which is not in model.vocab")


def check_vocabulary(vocab: Any, where: str) -> None:
    """Raises ValueError for what isn't ids by token; tokenizers makes room for every id up to the highest."""
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{where} is {short(vocab)}; give the ids of tokens by their text")
    for token, index in vocab.items():
        if not TOKEN.allows(index):
            raise ValueError(f"{where} has id {short(index)} for {short(token)}; give {TOKEN}")


@contextlib.contextmanager
def without_panics(path: Path) -> Iterator[None]:
    """Whatever tokenizers raises as ValueError, a panic too, which is a BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            problem = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is damaged or no tokenizer ({problem})") from None
        raise


def _check_part(content: Any, part: str, where: str) -> None:
    """Of a Sequence, all its members."""
    if content is None:
        return
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {short(content)}; give an object")
    kind = content.get("type")
    if kind == "Sequence" and part in _MEMBERS:
        name = _MEMBERS[part]
        check(content, {name: Items(Object(), 1, _NESTED)}, f"{where}.", required=(name,))
        for member in content[name]:
            if isinstance(member, Mapping) and member.get("type") == "Sequence":
                raise ValueError(f"{where} holds a Sequence in a Sequence; give one")
            _check_part(member, part, where)
    elif kind not in _TYPES[part]:
        known = ", ".join(str(one) for one in _TYPES[part] if one)
        raise ValueError(f"{where} is of type {short(kind)}, which Florence-2's is not; known are {known}")
    elif kind == "TemplateProcessing":
        _check_template(content, where)


def _check_template(content: Mapping[str, Any], where: str) -> None:
    """What the template names and doesn't give is a panic, when first used."""
    pieces = Items(Object(), 0, _NESTED)
    check(content, {"single": pieces, "pair": pieces, "special_tokens": Object()}, f"{where}.", required=("single",))
    special = content.get("special_tokens") or {}
    for piece in [*content["single"], *(content.get("pair") or ())]:
        named = value_at(piece, "SpecialToken.id", f"{where}: ")
        if named is not None and not (isinstance(named, str) and named in special):
            raise ValueError(f"{where}.special_tokens lacks {short(named)}, which the template names")
