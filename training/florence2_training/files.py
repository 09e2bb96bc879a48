"""Small files that are whole or not there."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """In place of what is there, or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text)
    scratch.replace(path)
