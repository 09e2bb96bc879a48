"""Exports that several test files serve, made once per run."""

import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[1]
MICROSOFT_FIXTURE = ROOT.parent / "shared" / "fixtures" / "microsoft_layout"
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"

# Tiny models are many times slower on several threads when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def exported(checkpoint: Path, name: str, factory: pytest.TempPathFactory) -> Path:
    """Made by the first process that asks, for all of a run."""
    folder = factory.getbasetemp()
    output = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with FileLock(f"{output}.lock"):
        if not output.is_dir():
            from florence2_export.export import export

            export(str(checkpoint), output)
    return output


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO_CHECKPOINT, "demo-export", tmp_path_factory)


@pytest.fixture(scope="session")
def microsoft_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MICROSOFT_FIXTURE.is_dir():
        pytest.skip(f"{MICROSOFT_FIXTURE} is missing: the checkpoint in Microsoft's layout and its answers")
    return exported(MICROSOFT_FIXTURE / "checkpoint", "microsoft-export", tmp_path_factory)
