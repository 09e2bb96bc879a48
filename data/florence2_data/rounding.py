"""By which rule somebody's location tokens were made, seen from the bins that it can reach.

Whole pixels 0..L of an axis shorter than 1000 reach only some bins, and each rule reaches others.
"""

from collections import Counter
from functools import lru_cache

from florence2.locations import Size
from florence2_data.parsing import BINS, LOCATION, RUN

_RULES = {
    # Florence-2's, and TF-ID's.
    "floor(p * 1000 / size)": lambda pixel, length: pixel * BINS // length,
    # maestro's, and ms-swift's from v3 on.
    "round(p * 1000 / size)": lambda pixel, length: round(pixel / length * BINS),
    # ms-swift v2's.
    "int(p / size * 999)": lambda pixel, length: int(pixel / length * (BINS - 1)),
}
_FLOOR = next(iter(_RULES))
_LONGEST_AXIS = 800
"""On longer axes every rule reaches most bins and tells little."""
_FEWEST = 100
_EXPLAINED, _LEAD = 0.95, 0.10
"""Another rule is named if it reaches at least 95 % of the coordinates and 10 points more than floor: annotations in
fractions of pixels reach any bin, so that no rule gets near 95 % (640 pixels: 64 %), and mixed data favours none."""
_ENOUGH = 20_000


class Rounding:
    """Counts the coordinates of texts that were written with `<loc_N>`."""

    def __init__(self) -> None:
        self.seen = 0
        self.reached: Counter[str] = Counter()

    @property
    def wants_more(self) -> bool:
        return self.seen < _ENOUGH

    def add(self, text: str, size: Size) -> None:
        """`size`: (width, height) of the upright picture."""
        for run in RUN.findall(text):
            for index, number in enumerate(map(int, LOCATION.findall(run))):
                length = size[index % 2]
                if length > _LONGEST_AXIS:
                    continue
                self.seen += 1
                for rule in _RULES:
                    self.reached[rule] += number in _reachable(rule, length)

    def warning(self) -> str:
        """The rule that explains the coordinates clearly better than floor, in words; "" if there is none."""
        if self.seen < _FEWEST:
            return ""
        best = max(_RULES, key=lambda rule: self.reached[rule])
        share, floor = self.reached[best] / self.seen, self.reached[_FLOOR] / self.seen
        if share < _EXPLAINED or share < floor + _LEAD:
            return ""
        return (
            f"{best} explains {share:.0%} of {self.seen} coordinates, Florence-2's {_FLOOR} {floor:.0%}; convert anew "
            "from pixels"
        )


@lru_cache(maxsize=4096)
def _reachable(rule: str, length: int) -> frozenset[int]:
    return frozenset(_RULES[rule](pixel, length) for pixel in range(length + 1))
