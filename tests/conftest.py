"""Exports that several test files serve, made once per run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[1]
MICROSOFT_FIXTURE = ROOT.parent / "shared" / "fixtures" / "microsoft_layout"
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"

# Tiny models are many times slower on several threads when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], object]) -> Path:
    """A folder that the first process that asks has made, for all of a run."""
    folder = factory.getbasetemp()
    output = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with FileLock(f"{output}.lock"):
        if not output.is_dir():
            half = output.with_name(f"{name}.half")
            make(half)
            half.rename(output)
    return output


def exported(checkpoint: Path, name: str, factory: pytest.TempPathFactory, precision: str = "fp32") -> Path:
    def make(output: Path) -> None:
        from florence2_export.export import export

        export(str(checkpoint), output, precision=precision)

    return once(name, factory, make)


@pytest.fixture(scope="session")
def demo_export(demo_exports: Callable[[str], Path]) -> Path:
    return demo_exports("fp32")


@pytest.fixture(scope="session")
def demo_exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By precision."""
    return lambda precision: exported(DEMO_CHECKPOINT, f"demo-{precision}", tmp_path_factory, precision)


@pytest.fixture(scope="session")
def microsoft_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MICROSOFT_FIXTURE.is_dir():
        pytest.skip(f"{MICROSOFT_FIXTURE} is missing: the checkpoint in Microsoft's layout and its answers")
    return exported(MICROSOFT_FIXTURE / "checkpoint", "microsoft-export", tmp_path_factory)


@pytest.fixture(scope="session")
def random_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `native` and `microsoft`: the same tiny random weights in both layouts."""

    def write(root: Path) -> None:
        import checkpoints

        root.mkdir()
        model = checkpoints.random_model(seed=3)
        checkpoints.write_native(root / "native", model)
        checkpoints.write_microsoft(root / "microsoft", model)

    return once("random", tmp_path_factory, write)


@pytest.fixture(scope="session")
def random_exports(random_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Of these, by layout and precision."""
    return lambda layout, precision: exported(
        random_checkpoints / layout, f"random-{layout}-{precision}", tmp_path_factory, precision
    )
