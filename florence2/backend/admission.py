"""Who comes in: refused at the front is what the steps behind it have no room or no time for."""

import time

from florence2.backend.occupancy import BEAM_SEARCH, Occupancy, Row
from florence2.errors import TimeIsOver, Unavailable

ACTIVE = 10.0
"""Seconds for which a beam_search that a request came to counts as one that they come to: a release that is kept to go
back to has room that nobody gets."""
LEARNING, REMEMBERED = 5.0, 60.0
"""Seconds of a queue after which its pace is known, and after which it is measured anew."""
ENOUGH = 10
"""Answers that make a pace."""


class Admission:
    """At the first model. Its own requests are in the `Occupancy` too."""

    def __init__(self, occupancy: Occupancy) -> None:
        self._occupancy = occupancy
        self._began: tuple[float, int] | None = None
        """When the queue began that is measured, and how many answers there had been."""
        self._pace: float | None = None
        """Answers a second while others wait."""

    def check(self, deadline: float) -> None:
        """Raises Unavailable if another request would be refused later, or TimeIsOver if its time would be over before
        its turn. `deadline`: on `time.monotonic`'s clock."""
        now = time.monotonic()
        rows = self._occupancy.read()
        engines = [row for row in rows if row.model == BEAM_SEARCH]
        if not engines:
            raise Unavailable("beam_search is being started; try again later")
        coming = sum(row.held for row in rows if row.model != BEAM_SEARCH)
        asked = [row for row in engines if row.came >= (now - ACTIVE) * 1e9]
        if coming >= sum(max(row.free, 0) for row in asked or engines):
            raise Unavailable(f"{sum(row.held for row in rows)} requests are here already; try again later")
        self._expect(now, deadline, rows)

    def _expect(self, now: float, deadline: float, rows: list[Row]) -> None:
        held, answered = sum(row.held for row in rows), sum(row.answered for row in rows)
        # While nobody waits, answers come as requests do, and tell nothing of how fast they could.
        if not any(row.waiting > 0 for row in rows):
            self._began = self._pace = None
            return
        began, count = self._began = self._began or (now, answered)
        # A beam_search has gone, and what it had answered.
        if answered < count:
            began, count = self._began = now, answered
        if now - began >= LEARNING and answered - count >= ENOUGH:
            self._pace = (answered - count) / (now - began)
            if now - began > REMEMBERED:
                self._began = now, answered
        if self._pace and now + held / self._pace > deadline:
            raise TimeIsOver(
                f"{held} requests are here already, which take about {held / self._pace:.0f} s, and its time is over "
                "before; allow more, or try again later"
            )
