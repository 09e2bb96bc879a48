"""Errors whose text is for the person who caused them."""


class InvalidRequest(ValueError):
    """What a request asks for can't be done; the text says what to change. Served as INVALID_ARGUMENT."""


class Unavailable(RuntimeError):
    """Nothing is wrong with the request, but it can't be answered now: too many wait, its time is over, or the server
    stops. Served as UNAVAILABLE."""


class TimeIsOver(Unavailable):
    """The time that a request may take is over, or would be before its answer."""


class Cancelled(RuntimeError):
    """Whoever asked doesn't want the answer any more. Served as CANCELLED."""
