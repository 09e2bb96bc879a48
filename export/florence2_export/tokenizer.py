"""A checkpoint's tokenizer, completed with the tokens that Florence-2's processor adds."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from florence2.fields import TOKEN, short
from florence2.manifest import read_json
from florence2.tokenizer_file import MEGABYTES, check_vocabulary, read_tokenizer, without_panics
from florence2_export.source import CheckpointError, Source, told_of_checkpoint

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
IMAGE = "<image>"

# The order gives the ids: Microsoft's processing_florence2.py, tokens_to_add; `desciption` is spelt as there.
FLORENCE_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{index}>" for index in range(1000)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>"),
    *("<seg>", "</seg>", "<sep>", "<region_cap>", "</region_cap>"),
    *(
        "<region_to_desciption>",
        "</region_to_desciption>",
        "<proposal>",
        "</proposal>",
        "<poly>",
        "</poly>",
        "<and>",
    ),
)


_ID = re.compile(r"[0-9]{1,10}")


def load_tokenizer(source: Source) -> Tokenizer:
    """Complete, without truncation or padding; `<s>` and `</s>` only where special tokens are asked for."""
    with told_of_checkpoint("copy the tokenizer from the checkpoint's base model"):
        if source.has("tokenizer.json"):
            tokenizer = read_tokenizer(source.path("tokenizer.json"))
        else:
            tokenizer = _from_vocabulary(source)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_declared(tokenizer, source)
        _add_missing(tokenizer, FLORENCE_TOKENS)
        _frame_with_bos_and_eos(tokenizer, source)
        return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Of a tokenizer from `load_tokenizer`, which has all three."""
    vocabulary = tokenizer.get_vocab()
    return {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[PAD]}


def _from_vocabulary(source: Source) -> Tokenizer:
    """BART's byte-level BPE from vocab.json and merges.txt, as transformers' BartTokenizer builds it."""
    if not source.has("vocab.json") or not source.has("merges.txt"):
        raise CheckpointError(
            f"{source.folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt: "
            "copy them from the checkpoint's base model"
        )
    vocab, merges = source.path("vocab.json"), source.path("merges.txt")
    prefix_space = bool(source.optional_json("tokenizer_config.json").get("add_prefix_space", False))
    check_vocabulary(read_json(vocab, MEGABYTES), f"{vocab}")
    if merges.stat().st_size > MEGABYTES * 1e6:
        raise CheckpointError(f"{merges} has more than {MEGABYTES} MB; get it again")
    with without_panics(merges):
        bpe = models.BPE.from_file(str(vocab), str(merges), continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    _add_missing(tokenizer, (BOS, PAD, EOS, UNK))
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True, normalized=False, special=True)])
    return tokenizer


def _add_declared(tokenizer: Tokenizer, source: Source) -> None:
    """Tokens that transformers keeps beside the vocabulary, with ids that must come out as given."""
    for file, declared in _declared(source):
        _add_missing(tokenizer, sorted(declared, key=declared.__getitem__))
        vocabulary = tokenizer.get_vocab()
        for token, index in declared.items():
            if vocabulary.get(token) != index:
                raise CheckpointError(
                    f"{source.folder / file}: {token[:80]} has id {index}, but the vocabulary gives it "
                    f"{vocabulary.get(token)}; copy the tokenizer from the checkpoint's base model"
                )


def _declared(source: Source) -> Iterator[tuple[str, dict[str, int]]]:
    content = source.optional_json("added_tokens.json")
    yield "added_tokens.json", _ids("added_tokens.json", content.items(), source)
    file = "tokenizer_config.json"
    by_id = source.optional_json(file).get("added_tokens_decoder") or {}
    if not isinstance(by_id, dict):
        raise CheckpointError(f"{source.folder / file}: added_tokens_decoder is {short(by_id)}; give an object")
    pairs = [
        (token.get("content") if isinstance(token, dict) else None, int(index) if _ID.fullmatch(index) else index)
        for index, token in by_id.items()
    ]
    yield file, _ids(file, pairs, source)


def _ids(file: str, pairs: Iterable[tuple[Any, Any]], source: Source) -> dict[str, int]:
    ids = {}
    for token, index in pairs:
        if not isinstance(token, str) or not TOKEN.allows(index):
            problem = f"its added tokens are not tokens with ids ({short(token)}: {short(index)})"
            raise CheckpointError(f"{source.folder / file}: {problem}; get it again")
        ids[token] = index
    return ids


def _add_missing(tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
    # A token of the vocabulary that is not an added one would be cut into pieces; adding keeps its id.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [AddedToken(token, normalized=False, special=True) for token in tokens if token not in added]
    tokenizer.add_special_tokens(missing)


def _frame_with_bos_and_eos(tokenizer: Tokenizer, source: Source) -> None:
    absent = [token for token in (BOS, EOS, PAD) if tokenizer.token_to_id(token) is None]
    if absent:
        raise CheckpointError(
            f"{source.folder}: the tokenizer has no {', '.join(absent)}; copy the base model's tokenizer"
        )
    ids = special_ids(tokenizer)
    with without_panics(source.folder):
        found = tokenizer.encode("").ids
    if found != [ids["bos_token_id"], ids["eos_token_id"]]:
        frame = [(BOS, ids["bos_token_id"]), (EOS, ids["eos_token_id"])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=frame)
