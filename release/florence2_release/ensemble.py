"""An ensemble's config.pbtxt: the name that clients call, its release, and the version of each model that it pins."""

from collections.abc import Collection, Mapping
from pathlib import Path

from florence2.files import write_whole
from florence2_release import configs
from florence2_release.version_files import FILES

ENSEMBLE = "florence2"
NEXT = "_next"
"""Behind the name of an ensemble: its candidate."""
ARRIVAL = "arrival"
"""The tensor that tells when a request came; to a step that takes none, it comes when it comes there."""


def write(folder: Path, number: int, models: Mapping[str, int], with_arrival: Collection[str]) -> None:
    """`folder` is called as clients call it. `with_arrival`: models that are told when a request came."""
    source = configs.shipped() / ENSEMBLE / configs.FILE_NAME
    config = configs.parsed(source)
    config.name = folder.name
    config.version_policy.specific.versions[:] = [number]
    for step in config.ensemble_scheduling.step:
        step.model_version = models[step.model_name]
        if step.model_name not in with_arrival:
            step.input_map.pop(ARRIVAL, None)
    version = folder / str(number)
    version.mkdir(parents=True, exist_ok=True)
    if not (version / "release.txt").is_file():
        # Object storage has no empty folders.
        write_whole(version / "release.txt", f"release-{number}.json\n")
    path = folder / configs.FILE_NAME
    if not path.is_file() or configs.parsed(path) != config:
        configs.write(path, config, source.read_text())


def is_ours(folder: Path) -> bool:
    """Whether it is an ensemble of ours, or what a kill left of one."""
    if (folder / configs.FILE_NAME).is_file():
        return {step.model_name for step in configs.parsed(folder / configs.FILE_NAME).ensemble_scheduling.step} == set(
            FILES
        )
    if not folder.is_dir():
        return False
    # Version folders, as far as the kill let them come.
    known = {"release.txt", ".release.txt.part"}
    return all(entry.is_dir() and {path.name for path in entry.iterdir()} <= known for entry in folder.iterdir())
