"""Exports that several test files serve, made once per run."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[1]
MICROSOFT_FIXTURE = ROOT.parent / "shared" / "fixtures" / "microsoft_layout"
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"

# Tiny models are many times slower on several threads when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from florence2_export.export import export

    output = tmp_path_factory.mktemp("exports") / "demo"
    export(str(DEMO_CHECKPOINT), output)
    return output


@pytest.fixture(scope="session")
def microsoft_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MICROSOFT_FIXTURE.is_dir():
        pytest.skip(f"{MICROSOFT_FIXTURE} is missing: the checkpoint in Microsoft's layout and its answers")
    from florence2_export.export import export

    output = tmp_path_factory.mktemp("exports") / "microsoft"
    export(str(MICROSOFT_FIXTURE / "checkpoint"), output)
    return output
