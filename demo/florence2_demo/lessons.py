"""What the text half is taught: each picture is asked one thing, chosen anew every time it comes up."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import RobertaTokenizer

from florence2.answer_limits import repeats
from florence2_demo.picture_store import Gallery
from florence2_demo.samples import Sample, answer

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


class Lessons:
    def __init__(self, tokenizer: RobertaTokenizer, gallery: Gallery, seed: int):
        self.tokenizer = tokenizer
        self.gallery = gallery
        self.seed = seed

    def lesson(self, index: int, visit: int) -> Sample:
        truth = self.gallery.truths[index]
        rng = np.random.default_rng([self.seed, visit, index])
        shares = TASK_SHARES[truth.kind]
        for task in rng.choice(list(shares), size=4, p=list(shares.values())):
            sample = answer(str(task), truth.kind, truth.things, truth.size, int(rng.integers(6)))
            # The checkpoint's no_repeat_ngram_size could not give an answer such as `ABABAB`.
            if sample is not None and not repeats(self.tokenizer(sample.target).input_ids, 3):
                return sample
        return self.lesson(index, visit + 1_000_003)

    def write(self, path: Path, pictures: Sequence[int], count: int) -> None:
        """`count` lines of `image`, `prefix` and `suffix`: one walk through the pictures after another."""
        with path.with_suffix(".new").open("w") as file:
            for place in range(count):
                index = pictures[place % len(pictures)]
                sample = self.lesson(index, place // len(pictures))
                line = {"image": self.gallery.file(index), "prefix": sample.prompt, "suffix": sample.target}
                file.write(json.dumps(line) + "\n")
        path.with_suffix(".new").replace(path)
