"""Installing exports as releases."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import exports
import pytest
from florence2_release import configs, startup
from florence2_release.ensemble import ENSEMBLE
from florence2_release.install import install
from florence2_release.prune import prune
from florence2_release.repository import Repository
from florence2_release.rollback import roll_back
from florence2_release.version_files import FILES
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2 import files
from florence2.manifest import Manifest, ModelSettings, sha256_of


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return exports.write(tmp_path / "export")


def config(repository: Path, model: str) -> ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def changed(export: Path, folder: Path, *names: str) -> Path:
    """The export with other bytes in some files, as a fine-tune has them."""
    other = shutil.copytree(export, folder)
    for name in names:
        # Settings stay what they are, in other bytes.
        text = (other / name).read_text() if name.endswith(".json") else folder.name
        (other / name).write_text(f"{text}\n")
    manifest = Manifest.read(other)
    files = {name: sha256_of(other / name) for name in manifest.files}
    replace(manifest, files=files, source=folder.name).write(other)
    return other


def versions(repository: Path) -> dict[str, list[int]]:
    """What Triton is told to load."""
    return {model: list(config(repository, model).version_policy.specific.versions) for model in FILES}


def test_first_release(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "new" / "repository"
    release = install(export, repository)
    assert (release.number, release.models) == (1, dict.fromkeys(FILES, 1))
    for model, names in FILES.items():
        assert {path.name for path in (repository / model / "1").iterdir()} == {"model.py", *names}
        assert config(repository, model).name == model
    assert [path.name for path in (repository / ENSEMBLE / "1").iterdir()] == ["release.txt"]
    assert (repository / "release-1.json").is_file()
    assert (repository / "beam_search" / "1" / "decoder.onnx").read_text() == "decoder.onnx"
    assert {path.stat().st_nlink for path in repository.glob("*/1/*")} == {1}
    assert ModelSettings.read(repository / "postprocess" / "1") == ModelSettings(exports.SIZES, [])
    assert Repository(repository).releases() == [release]
    assert Repository(repository).state(release) == "live"


def test_the_next_release_takes_the_next_number_and_leaves_the_others(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    before = {path: path.read_bytes() for path in repository.glob("*/1/*")}
    everything = [name for names in FILES.values() for name in names if name != ModelSettings.FILE_NAME]
    assert install(changed(export, tmp_path / "other", *everything), repository).number == 2
    assert {path: path.read_bytes() for path in repository.glob("*/1/*")} == before
    ensemble = config(repository, ENSEMBLE)
    assert list(ensemble.version_policy.specific.versions) == [2]
    assert [(step.model_name, step.model_version) for step in ensemble.ensemble_scheduling.step] == [
        (model, 2) for model in FILES
    ]
    assert versions(repository) == {model: [2] for model in FILES}


def test_models_of_the_same_bytes_are_shared(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    tuned = changed(export, tmp_path / "tuned", "encoder.onnx.data", "decoder.onnx.data")
    release = install(tuned, repository)
    assert release.models == {**dict.fromkeys(FILES, 1), "beam_search": 2}
    assert not (repository / "vision_encoder" / "2").exists()
    assert versions(repository) == {**{model: [1] for model in FILES}, "beam_search": [2]}
    # Not with a file that is no longer what it was.
    (repository / "vision_encoder" / "1" / "vision_encoder.onnx").unlink()
    (repository / "vision_encoder" / "1" / "vision_encoder.onnx").write_text("torn")
    again = install(changed(export, tmp_path / "again", "decoder.onnx"), repository)
    assert again.models == {"preprocess": 1, "vision_encoder": 3, "beam_search": 3, "postprocess": 1}


def test_fine_tunes_have_names_of_their_own(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    invoices = install(changed(export, tmp_path / "invoices", "decoder.onnx.data"), repository, "florence2_invoices")
    assert invoices.models == {**dict.fromkeys(FILES, 1), "beam_search": 2}
    assert Repository(repository).names() == ["florence2", "florence2_invoices"]
    assert config(repository, "florence2_invoices").name == "florence2_invoices"
    assert versions(repository) == {**{model: [1] for model in FILES}, "beam_search": [1, 2]}
    for name in ("vision_encoder", "a/b", "invoices_next", "", ".hidden"):
        with pytest.raises(ValueError, match="can't be a model's name here"):
            install(export, repository, name)


def test_what_was_set_in_a_config_stays(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    own = config(repository, "beam_search")
    own.parameters["rows"].string_value = "96"
    own.instance_group[0].count = 2
    (repository / "beam_search" / "config.pbtxt").write_text(text_format.MessageToString(own))
    install(changed(export, tmp_path / "other", "decoder.onnx.data"), repository)
    found = config(repository, "beam_search")
    assert (found.parameters["rows"].string_value, found.instance_group[0].count) == ("96", 2)
    assert found.parameters["cache_length"].string_value == "1024"


def test_a_number_is_never_used_again(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for number in (1, 2, 3):
        assert install(changed(export, tmp_path / str(number), "decoder.onnx"), repository).number == number
    kept = Repository(repository)
    with pytest.raises(ValueError, match="releases to keep are counted from 0 on, not -1"):
        prune(kept, -1)
    assert [release.number for release in prune(kept, 0)] == [1, 2]
    assert sorted(path.name for path in (repository / "beam_search").iterdir()) == ["3", "config.pbtxt"]
    assert [kept.state(release) for release in kept.releases()] == ["replaced", "replaced", "live"]
    assert [kept.is_there(release) for release in kept.releases()] == [False, False, True]
    assert install(changed(export, tmp_path / "4", "decoder.onnx"), repository).number == 4


def test_a_release_that_is_looked_at_is_not_loaded_at_a_start(export: Path, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    install(export, repository.folder)
    release = repository.add(changed(export, tmp_path / "other", "decoder.onnx"), ENSEMBLE)
    assert versions(repository.folder)["beam_search"] == [1]
    repository.add_candidate(release)
    assert versions(repository.folder)["beam_search"] == [1, 2]
    assert repository.state(release) == "looked at"
    # The command that looks at it goes on.
    with repository.locked():
        startup.prepare(repository)
    assert repository.ensembles() == ["florence2", "florence2_next"]
    # As a kill leaves it.
    (repository.folder / "florence2_next" / "config.pbtxt").unlink()
    (repository.folder / "beam_search" / ".new-x").mkdir()
    (repository.folder / "beam_search" / ".config.pbtxt.part").touch()
    startup.prepare(repository)
    assert not list(repository.folder.glob("*/.*"))
    assert repository.ensembles() == ["florence2"]
    assert versions(repository.folder)["beam_search"] == [1]


def test_the_release_before_stays_loaded(export: Path, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    found = [install(export, repository.folder)]
    for number in (2, 3):
        found.append(repository.add(changed(export, tmp_path / str(number), "decoder.onnx"), ENSEMBLE))
        repository.make_live(found[-1], number - 1)
        repository.reconcile()
    assert versions(repository.folder)["beam_search"] == [2, 3]
    assert [repository.state(release) for release in found] == ["replaced", "standby", "live"]
    assert prune(repository, 0) == [found[0]]
    back = roll_back(repository, None, ENSEMBLE)
    assert (back.number, repository.live(ENSEMBLE), repository.pins(ENSEMBLE)["beam_search"]) == (2, 2, 2)
    assert versions(repository.folder)["beam_search"] == [2]
    assert [repository.state(release) for release in repository.releases()] == [
        *("replaced", "live", "rolled back: asked for")
    ]
    with pytest.raises(ValueError, match="has none before it that is kept; name one with --to"):
        roll_back(repository, None, ENSEMBLE)
    with pytest.raises(ValueError, match=r"release 1 is not whole any more: .*beam_search/1/model\.py is missing"):
        roll_back(repository, None, ENSEMBLE, 1)
    assert roll_back(repository, None, ENSEMBLE, 3).number == 3
    assert roll_back(repository, None, ENSEMBLE, 3).outcome == "live"
    with pytest.raises(ValueError, match="has no record of a release 9; `florence2 releases` lists them"):
        roll_back(repository, None, ENSEMBLE, 9)


def test_weights_that_are_exported_again_do_not_change_a_release(export: Path, tmp_path: Path) -> None:
    install(export, tmp_path / "repository")
    new = export / "new"
    new.write_text("other weights")
    new.rename(export / "decoder.onnx.data")
    installed = tmp_path / "repository" / "beam_search" / "1" / "decoder.onnx.data"
    assert installed.read_text() == "decoder.onnx.data"


def test_settings_that_are_edited_in_the_export_do_not_change_a_release(export: Path, tmp_path: Path) -> None:
    install(export, tmp_path / "repository")
    with (export / "generation_config.json").open("a") as file:
        file.write("edited")
    installed = tmp_path / "repository" / "beam_search" / "1" / "generation_config.json"
    assert json.loads(installed.read_text()) == exports.GENERATION


def test_a_file_that_is_not_what_the_manifest_names(export: Path, tmp_path: Path) -> None:
    (export / "decoder.onnx.data").write_text("cut")
    with pytest.raises(ValueError, match=r"decoder\.onnx\.data is not the file its manifest names"):
        install(export, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_an_interrupted_release_changes_nothing_and_the_next_goes_through(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    configs = {path: path.read_bytes() for path in repository.glob("*/config.pbtxt")}
    taken: list[Path] = []
    other = changed(export, tmp_path / "other", "vision_encoder.onnx.data", "decoder.onnx")

    def full_disk(source: Path, target: Path) -> None:
        taken.append(target)
        if len(taken) == 2:
            raise OSError(28, "No space left on device")
        shutil.copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("florence2_release.repository.copy", full_disk)
        with pytest.raises(OSError, match=r"release 2 could not be written \(.*No space left.*\); make room and"):
            install(other, repository)
    assert {path: path.read_bytes() for path in repository.glob("*/config.pbtxt")} == configs
    # Nothing takes the room that is wanted.
    assert not list(repository.glob("*/.new-*"))
    assert not list(repository.glob("*/2"))
    assert install(other, repository).models["vision_encoder"] == 2


def test_what_a_kill_left_is_removed_and_what_is_older_than_records_is_not(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for number in (1, 2):
        install(changed(export, tmp_path / str(number), "decoder.onnx"), repository)
    (repository / "release-1.json").unlink()
    shutil.copytree(repository / "beam_search" / "2", repository / "beam_search" / "3")
    install(changed(export, tmp_path / "3", "vision_encoder.onnx.data"), repository)
    assert sorted(path.name for path in (repository / "beam_search").iterdir()) == ["1", "2", "3", "config.pbtxt"]
    assert (repository / "beam_search" / "3" / "decoder.onnx").read_text() == "decoder.onnx"


def test_releases_at_the_same_time_take_turns(export: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: install(export, tmp_path / "repository"), range(8)))
    assert sorted(release.number for release in found) == list(range(1, 9))


def test_refusals(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json is missing.*florence2 export"):
        install(tmp_path, tmp_path / "repository")
    strange = tmp_path / "strange"
    (strange / "resnet" / "1").mkdir(parents=True)
    (strange / "resnet" / "1" / "model.onnx").touch()
    with pytest.raises(ValueError, match=r"not a model repository of florence2.*resnet"):
        install(export, strange)
    with pytest.raises(ValueError, match="not a folder"):
        install(export, export / "manifest.json")
    (export / "decoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"lacks decoder\.onnx"):
        install(export, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_the_shipped_models_are_no_repository(export: Path) -> None:
    before = sorted(configs.shipped().rglob("*"))
    for use in (lambda folder: install(export, folder), lambda folder: startup.prepare(Repository(folder))):
        with pytest.raises(ValueError, match="makes repositories from; give another --repository"):
            use(configs.shipped())
    assert sorted(configs.shipped().rglob("*")) == before


def test_a_manifest_that_is_not_ours(export: Path, tmp_path: Path) -> None:
    (export / "manifest.json").write_text(json.dumps({"source": "x"}))
    with pytest.raises(ValueError, match="export the checkpoint again"):
        install(export, tmp_path / "repository")


def ensemble_of(name: str = "florence2") -> ModelConfig:
    return configs.parsed(configs.shipped() / name / "config.pbtxt")


def test_no_output_of_the_ensemble_is_read_by_a_step() -> None:
    """Triton would leave out the step that makes it whenever a request doesn't name it."""
    config = ensemble_of()
    outputs = {tensor.name for tensor in config.output}
    steps = config.ensemble_scheduling.step
    assert outputs.isdisjoint(value for step in steps for value in step.input_map.values())
    assert {step.model_name for step in steps if outputs & set(step.output_map.values())} == {"postprocess"}
    assert not config.HasField("response_cache")


def test_the_response_cache_is_what_the_start_says(export: Path, tmp_path: Path) -> None:
    install(export, tmp_path / "models")
    repository = Repository(tmp_path / "models")

    def cached() -> tuple[list[str], str]:
        """Models that have one, and what preprocess is told."""
        found = {model: config(repository.folder, model) for model in FILES}
        told = found["preprocess"].parameters["response_cache"].string_value
        return [model for model, one in found.items() if one.response_cache.enable], told

    assert cached() == ([], "false")
    startup.prepare(repository, response_cache=True)
    assert repository.response_cache
    assert cached() == (["vision_encoder", "beam_search"], "true")
    # A release while it is served leaves it as it is.
    install(export, repository.folder)
    assert cached() == (["vision_encoder", "beam_search"], "true")
    startup.prepare(repository)
    assert not repository.response_cache
    assert cached() == ([], "false")
    # Of what Triton's own backends run nothing is cached, and no time of arrival is told.
    startup.prepare(repository, "cuda", response_cache=True)
    assert cached() == (["beam_search"], "true")
    steps = configs.parsed(repository.folder / "florence2" / "config.pbtxt").ensemble_scheduling.step
    assert {step.model_name for step in steps if "arrival" in step.input_map} == {"beam_search"}


def test_installed_configs_keep_the_comments(export: Path, tmp_path: Path) -> None:
    install(export, tmp_path / "models")
    for model in FILES:
        shipped, installed = ((folder / model / "config.pbtxt") for folder in (configs.shipped(), tmp_path / "models"))
        lines = [line for line in shipped.read_text().splitlines() if line.startswith("#")]
        text = installed.read_text()
        assert [line for line in lines if line not in text.splitlines()] == []
        assert configs.parsed(installed) == configs.parsed(shipped)
    text = (tmp_path / "models" / "beam_search" / "config.pbtxt").read_text()
    assert re.search(r'\n# Threads of ONNX Runtime; [^\n]*\nparameters \{\n  key: "threads"', text)
    assert configs.parsed(tmp_path / "models" / "florence2" / "config.pbtxt") == ensemble_of()
    assert (
        "# Versions are pinned: a request never mixes two releases."
        in (tmp_path / "models" / "florence2" / "config.pbtxt").read_text()
    )


def test_older_copies_of_model_py_are_replaced_at_the_start(export: Path, tmp_path: Path) -> None:
    release = install(export, tmp_path / "models")
    repository = Repository(tmp_path / "models")
    stale = repository.folder / "beam_search" / "1" / "model.py"
    stale.write_text("from florence2.triton import respond\n")
    release.files["beam_search"]["model.py"] = sha256_of(stale)
    repository.write(release)
    assert startup.outdated(repository) == [stale]
    with pytest.raises(ValueError, match=r"are those of another release of florence2-triton: stop and start"):
        startup.check_up_to_date(repository)
    startup.prepare(repository)
    startup.check_up_to_date(repository)
    assert stale.read_text() == "from florence2.backend.beam_search import TritonPythonModel  # noqa: F401\n"
    assert repository.damage(repository.release(1)) is None
    # Shared with the next, as the same bytes are.
    assert install(export, repository.folder).models["beam_search"] == 1


def test_engines_are_kept_where_the_start_says(export: Path, tmp_path: Path) -> None:
    install(export, tmp_path / "models", profile="tensorrt-ep")
    repository = Repository(tmp_path / "models")

    def places() -> set[str]:
        vision, search = (
            configs.parsed(repository.folder / model / "config.pbtxt") for model in ("vision_encoder", "beam_search")
        )
        (accelerator,) = vision.optimization.execution_accelerators.gpu_execution_accelerator
        return {accelerator.parameters["trt_engine_cache_path"], search.parameters["tensorrt_cache"].string_value}

    startup.prepare(repository, engine_cache=tmp_path / "engines")
    assert places() == {str(tmp_path / "engines")}
    assert (tmp_path / "engines").stat().st_mode & 0o777 == 0o700
    install(export, repository.folder)
    assert places() == {str(tmp_path / "engines")}


def test_engines_that_others_may_replace_are_not_run(export: Path, tmp_path: Path) -> None:
    install(export, tmp_path / "models", profile="tensorrt-ep")
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines").chmod(0o775)
    with pytest.raises(ValueError, match=r"engines, where TensorRT's engines are kept, can be written by others"):
        startup.prepare(Repository(tmp_path / "models"), engine_cache=tmp_path / "engines")


def test_files_are_on_the_disk_before_their_name_is(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before what it names does (rename(2), fsync(2))."""
    flushed: list[Path] = []
    flush, rename, replace = files.flush, Path.rename, Path.replace
    late: list[Path] = []

    def check(source: Path) -> None:
        needed = [source, *source.iterdir()] if source.is_dir() else [source]
        late.extend(path for path in needed if path not in flushed)

    monkeypatch.setattr(files, "flush", lambda path: (flushed.append(path), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (check(self), rename(self, target))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (check(self), replace(self, target))[1])
    install(export, tmp_path / "models")
    assert late == []
    names = {tmp_path / "models" / model for model in FILES} | {tmp_path / "models"}
    assert names <= set(flushed)
