"""Errors whose text is for the person who caused them."""


class InvalidRequest(ValueError):
    """What a request asks for can't be done; the text says what to change. Served as INVALID_ARGUMENT."""
