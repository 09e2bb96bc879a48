"""Installing exports as releases."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from florence2_release.install import ENSEMBLE, FILES, install
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.manifest import Manifest, Sizes, sha256_of

SIZES = Sizes(
    image_height=64,
    image_width=64,
    image_tokens=17,
    d_model=8,
    vocab_size=10,
    decoder_layers=1,
    decoder_attention_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    location_bins=10,
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    names = sorted({name for files in FILES.values() for name in files} - {"manifest.json"})
    for name in names:
        (folder / name).write_text(name)
    Manifest(
        source="somewhere",
        revision=None,
        sha256="0",
        layout="native",
        repairs=[],
        precision="fp32",
        opset=20,
        sizes=SIZES,
        banned_grounding_phrases=[],
        tools={},
        files={name: sha256_of(folder / name) for name in names},
    ).write(folder)
    return folder


def config(repository: Path, model: str) -> ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def test_first_release(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "new" / "repository"
    assert install(export, repository) == 1
    for model, names in FILES.items():
        assert {path.name for path in (repository / model / "1").iterdir()} == {"model.py", *names}
        assert config(repository, model).name == model
    assert list((repository / ENSEMBLE / "1").iterdir()) == []
    assert (repository / "beam_search" / "1" / "decoder.onnx").read_text() == "decoder.onnx"


def test_the_next_release_takes_the_next_number_and_leaves_the_others(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    before = {path: path.read_bytes() for path in repository.rglob("1/*") if path.is_file()}
    assert install(export, repository) == 2
    assert {path: path.read_bytes() for path in repository.rglob("1/*") if path.is_file()} == before
    ensemble = config(repository, ENSEMBLE)
    assert list(ensemble.version_policy.specific.versions) == [2]
    assert [(step.model_name, step.model_version) for step in ensemble.ensemble_scheduling.step] == [
        (model, 2) for model in FILES
    ]


def test_a_number_is_never_used_again(export: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    install(export, repository)
    install(export, repository)
    for model in FILES:
        shutil.rmtree(repository / model / "2")
    assert install(export, repository) == 3


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
    assert installed.read_text() == "generation_config.json"


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

    def full_disk(source: Path, target: Path) -> None:
        taken.append(target)
        if len(taken) == 6:
            raise OSError(28, "No space left on device")
        shutil.copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("florence2_release.install._take", full_disk)
        with pytest.raises(OSError, match="No space left"):
            install(export, repository)
    assert {path: path.read_bytes() for path in repository.glob("*/config.pbtxt")} == configs
    assert not list(repository.glob("*/.new-*"))
    assert install(export, repository) == 3
    assert list(config(repository, "beam_search").version_policy.specific.versions) == [3]


def test_releases_at_the_same_time_take_turns(export: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: install(export, tmp_path / "repository"), range(8)))
    assert sorted(numbers) == list(range(1, 9))


def test_refusals(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json is missing.*florence2 export"):
        install(tmp_path, tmp_path / "repository")
    strange = tmp_path / "strange"
    (strange / "resnet").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"not a model repository of florence2.*resnet"):
        install(export, strange)
    with pytest.raises(ValueError, match="not a folder"):
        install(export, export / "manifest.json")
    (export / "decoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"lacks decoder\.onnx"):
        install(export, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_manifest_that_is_not_ours(export: Path, tmp_path: Path) -> None:
    (export / "manifest.json").write_text(json.dumps({"source": "x"}))
    with pytest.raises(ValueError, match="export the checkpoint again"):
        install(export, tmp_path / "repository")
