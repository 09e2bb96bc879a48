"""Every metric, what it applies to, and how predictions are scored.

All answers are free-running: the model reads its own words, never the reference's.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from florence2_evaluation import captions, segmentation, text_metrics, vqa
from florence2_evaluation.detection import MOST_LABELS, Pair, box_ious, match, quad_ious
from florence2_evaluation.group import Case, Group, Kind, groups
from florence2_evaluation.prediction import Prediction


@dataclass(frozen=True)
class Score:
    task: str
    metric: str
    value: float
    count: int
    """Questions it is computed from."""
    higher_is_better: bool

    @property
    def name(self) -> str:
        return f"{self.task} {self.metric}"


Measure = Callable[[Group], float | None]


@dataclass(frozen=True)
class Metric:
    kinds: tuple[Kind, ...]
    measure: Measure
    """None where the data leave it undefined."""
    source: str
    higher_is_better: bool = True


def score(predictions: Iterable[Prediction], iou: float = 0.5) -> list[Score]:
    """By task, every metric that applies to its answers and is defined for them. `iou`: what a box must reach to be
    right, where a metric doesn't say. Raises ValueError for a prediction that can't be compared with anything."""
    return [one for group in groups(predictions, iou) for one in score_group(group)]


def score_group(group: Group) -> list[Score]:
    scores = []
    for name, metric in METRICS.items():
        value = metric.measure(group) if group.kind in metric.kinds else None
        if value is not None:
            count = len(_counted(name, group))
            stated = name.format(iou=f"{group.iou:g}")
            scores.append(Score(group.name, stated, float(value), count, metric.higher_is_better))
    if group.kind is Kind.DETECTION and len(group.detection.labels) <= _NAMED:
        for label, value in group.detection.average_precision_of_labels(0.5).items():
            scores.append(Score(group.name, f"AP50[{label}]", value, len(group.cases), True))
    return scores


_NAMED = 100
"""Labels that have a score of their own; more are descriptions, not classes."""


def notes(groups: Sequence[Group], scores: Sequence[Score]) -> list[str]:
    """What a reader of the scores must know besides."""
    found = []
    if any(one.metric.endswith("-nojava") for one in scores):
        found.append(f"-nojava: {NOT_COMPARABLE}")
    for group in groups:
        if group.kind is Kind.DETECTION and len(group.detection.labels) > MOST_LABELS:
            found.append(f"{group.name}: {len(group.detection.labels)} labels, AP is for at most {MOST_LABELS}")
    return found


def metric_of(one: Score) -> Metric:
    return METRICS[re.sub(r"\[.*\]$", "", re.sub(r"@[\d.]+$", "@{iou}", one.metric))]


def _counted(name: str, group: Group) -> list[Case]:
    if name == "accuracy@{iou}":
        return _expressions(group)
    if name == "VQA accuracy":
        return [case for case in group.cases if len(case.wanted) == vqa.ANNOTATORS]
    return group.cases


def _expressions(group: Group) -> list[Case]:
    return [case for case in group.cases if len(case.expected) == 1]


def _grounding_accuracy(group: Group) -> float | None:
    """RefCOCO's: the expression has one box, and the best-scored box of the answer, whatever its label, is it."""
    hits = []
    for case in _expressions(group):
        best = Pair(case.answered[:1], case.expected, case.prediction.size)
        hits.append(bool(best.answered) and box_ious(best)[0, 0] >= group.iou)
    return sum(hits) / len(hits) if hits else None


def _overlaps(group: Group) -> list[segmentation.Overlap]:
    sides = (
        [segmentation.area(instances, case.prediction.size) for instances in (case.answered, case.expected)]
        for case in group.cases
    )
    return [segmentation.overlap(*pair) for pair in sides]


def _pairs(group: Group) -> list[text_metrics.Pair]:
    return [(case.answer, case.wanted) for case in group.cases]


def _words_in_place(group: Group) -> list[text_metrics.Pair]:
    """The texts of quads that lie where one is wanted."""
    found: list[text_metrics.Pair] = []
    for case in group.cases:
        pair = case.pair
        for index, other in match(pair.answered, pair.wanted, quad_ious(pair), group.iou, labelled=False):
            found.append((pair.answered[index].label, [pair.wanted[other].label]))
    return found


def _read_in_place(group: Group) -> float | None:
    wanted = sum(len(case.expected) for case in group.cases)
    return sum(answer in texts for answer, texts in _words_in_place(group)) / wanted if wanted else None


def _found_in_place(group: Group) -> float | None:
    wanted = sum(len(case.expected) for case in group.cases)
    return len(_words_in_place(group)) / wanted if wanted else None


def _caption(measure: Callable[[captions.Words], float | None], ptb: bool) -> Measure:
    return lambda group: measure(group.words) if group.words.ptb is ptb else None


_BOXES = (Kind.DETECTION,)
# Region proposals and bare locations have no labels: all are equal.
_MATCHED = (Kind.DETECTION, Kind.PROPOSAL, Kind.LOCATIONS)
_POINTED_AT = (Kind.GROUNDING, Kind.LOCATIONS)
_TEXTS = (Kind.CAPTION, Kind.READING, Kind.CATEGORY, Kind.TEXT)
_BINNED = f"boxes of the data set rounded to bins, crowds left out, at most {MOST_LABELS} labels"
NOT_COMPARABLE = "without Java: another tokenizer than PTB's, not comparable with published figures"

METRICS: dict[str, Metric] = {
    "AP": Metric(
        _BOXES, lambda g: g.detection.average_precision(), f"pycocotools, mean over IoU 0.5 to 0.95; {_BINNED}"
    ),
    "AP50": Metric(_BOXES, lambda g: g.detection.average_precision(0.5), f"pycocotools; {_BINNED}"),
    "AP75": Metric(_BOXES, lambda g: g.detection.average_precision(0.75), f"pycocotools; {_BINNED}"),
    "precision@{iou}": Metric(
        _MATCHED, lambda g: g.detection.precision(), "best score first, one to one, equal labels"
    ),
    "recall@{iou}": Metric(_MATCHED, lambda g: g.detection.recall(), "best score first, one to one, equal labels"),
    "F1@{iou}": Metric(_MATCHED, lambda g: g.detection.f1(), "of the two before"),
    "page_exact@{iou}": Metric(
        _BOXES, lambda g: g.detection.exact(), "all boxes found, none besides; TF-ID's are judged by people"
    ),
    "unknown_labels": Metric(
        _BOXES, lambda g: g.detection.unknown_labels(), "share of the boxes whose label no reference has", False
    ),
    "accuracy@{iou}": Metric(
        _POINTED_AT, _grounding_accuracy, "RefCOCO: one box wanted, and the answer's best-scored box"
    ),
    "found@{iou}": Metric(
        (Kind.GROUNDING,), lambda g: g.detection.recall(), "share of wanted boxes that a box of equal label covers"
    ),
    "mIoU": Metric((Kind.SEGMENTATION,), lambda g: segmentation.mean_iou(_overlaps(g)), "pycocotools.mask"),
    "cIoU": Metric((Kind.SEGMENTATION,), lambda g: segmentation.cumulative_iou(_overlaps(g)), "pycocotools.mask"),
    "CIDEr": Metric((Kind.CAPTION,), _caption(captions.cider, True), "pycocoevalcap; 1 is published as 100"),
    "BLEU4": Metric((Kind.CAPTION,), _caption(captions.bleu4, True), "pycocoevalcap; 0 to 1"),
    "CIDEr-nojava": Metric((Kind.CAPTION,), _caption(captions.cider, False), f"pycocoevalcap {NOT_COMPARABLE}"),
    "BLEU4-nojava": Metric((Kind.CAPTION,), _caption(captions.bleu4, False), f"pycocoevalcap {NOT_COMPARABLE}"),
    "VQA accuracy": Metric((Kind.TEXT,), lambda g: vqa.accuracy(_pairs(g)), "official VQA evaluation, ten answers"),
    "ANLS": Metric((Kind.TEXT,), lambda g: text_metrics.anls(_pairs(g)), "rapidfuzz; DocVQA's, threshold 0.5"),
    "CER": Metric((Kind.READING,), lambda g: text_metrics.character_errors(_pairs(g)), "jiwer", False),
    "WER": Metric((Kind.READING,), lambda g: text_metrics.word_errors(_pairs(g)), "jiwer", False),
    "NED": Metric((Kind.READING,), lambda g: text_metrics.normalized_distance(_pairs(g)), "rapidfuzz", False),
    "found_quads@{iou}": Metric((Kind.READING_IN_PLACE,), _found_in_place, "share of wanted quads that one covers"),
    "read_in_place@{iou}": Metric((Kind.READING_IN_PLACE,), _read_in_place, "... and whose text is read exactly"),
    "CER_in_place@{iou}": Metric(
        (Kind.READING_IN_PLACE,), lambda g: text_metrics.character_errors(_words_in_place(g)), "jiwer", False
    ),
    "exact": Metric(_TEXTS, lambda g: text_metrics.exact(_pairs(g)), "equal to a reference"),
}
