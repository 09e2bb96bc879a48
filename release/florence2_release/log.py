"""What Triton's log says."""

import json
import re

_ERROR_LINE = re.compile(r"^(?:E\d{4} \S+ \d+ \S+\] |error: |\[libprotobuf ERROR [^\]]*\] )(.*)$", re.MULTILINE)
_CAUSE = re.compile(r"^(failed to load ('|model ')|Poll failed|Error parsing)")
# The first is on every machine without a GPU; the others repeat what the model's own line says.
_ECHO = re.compile(
    r"CudaDriverHelper|^ERROR: Failed to create instance|^creating server: Internal - failed to load all"
)


def failure(log: str) -> str:
    """What a server's log says of why it failed: each failed model with its Python exception."""
    errors = [_unquote(line) for line in _ERROR_LINE.findall(log)]
    errors = [line for line in errors if not _ECHO.search(line)]
    causes = [line for line in errors if _CAUSE.match(line)] or errors or log.splitlines()[-20:]
    first, *rest = "\n".join(dict.fromkeys(causes)).splitlines() or ["its log is empty"]
    return "\n".join([first, *(f"  {line}" for line in rest if line.strip())])


def _unquote(message: str) -> str:
    """From 24.07 on the server writes its messages as JSON strings."""
    try:
        text = json.loads(message)
    except ValueError:
        return message
    return text if isinstance(text, str) else message


def loading(log: str) -> str:
    """How far a starting server has come, in words."""
    wanted = dict.fromkeys(re.findall(r"\bloading: (\S+?):\d+", log))
    loaded = set(re.findall(r"\bsuccessfully loaded '([^']+)'", log))
    waiting = [name for name in wanted if name not in loaded]
    if not wanted:
        return "starting the server"
    return f"{len(loaded)} of {len(wanted)} models loaded" + (f", waiting for {', '.join(waiting)}" if waiting else "")
