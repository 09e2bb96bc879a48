"""What the server may answer instead of an answer."""

_HINTS = {
    "UNAVAILABLE": "is the server running there? HOST:8001 is Triton's gRPC endpoint, http://HOST:8000 its HTTP one",
    "NOT_FOUND": "is there a release of that name? `florence2 releases` lists them",
    "DEADLINE_EXCEEDED": "allow more time with timeout=, or send fewer requests at once",
    "UNAUTHENTICATED": "give what the endpoint asks for in headers=",
    "PERMISSION_DENIED": "give what the endpoint asks for in headers=",
}


class ServerRefused(RuntimeError):
    """The server answered with an error, or not at all."""

    status: str
    """gRPC's name of what was wrong, over HTTP too: INVALID_ARGUMENT for a request that will never do, UNAVAILABLE for
    a server that is busy or can't be reached, DEADLINE_EXCEEDED, NOT_FOUND, INTERNAL, …"""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type["ServerRefused"], tuple[str, str]]:
        # For worker processes: exceptions are pickled with `args` alone.
        return ServerRefused, (str(self), self.status)


def refused(url: str, message: str, status: str, reached: bool = True) -> ServerRefused:
    """With what to do about it, where the server does not say: `reached` tells whether it was the server who spoke."""
    hint = _HINTS.get(status, "")
    if status == "UNAVAILABLE" and reached:
        hint = ""
    return ServerRefused("; ".join(part for part in (f"{url}: {message}", hint) if part), status)
