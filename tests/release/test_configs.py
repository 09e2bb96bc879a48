"""Profiles: configs/*.pbtxt, against config.pbtxt, against the export's tensors, and in a repository that is served."""

import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from conftest import ROOT
from florence2_export import tensorrt
from florence2_release import configs, startup
from florence2_release.install import install
from florence2_release.profiles import BEAM_SEARCH
from florence2_release.repository import Repository
from florence2_release.server import ServerError, TritonServer
from florence2_release.version_files import FILES, OPTIONAL
from google.protobuf import text_format
from serving import figures, running
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from florence2.generation import sessions

MODELS = ROOT / "model_repository"
PROFILES = ("cuda", "cuda-python", "tensorrt", "tensorrt-ep")
TYPES = {"TYPE_UINT8": onnx.TensorProto.UINT8, "TYPE_FP32": onnx.TensorProto.FLOAT}


def parsed(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


def config(model: str, profile: str) -> ModelConfig:
    shipped = configs._shipped(model, profile)
    assert shipped
    return shipped.config


def given(found: ModelConfig) -> dict[str, str]:
    return {name: parameter.string_value for name, parameter in found.parameters.items()}


def test_these_are_all() -> None:
    found = {(path.parts[-3], path.stem) for path in MODELS.glob("*/configs/*.pbtxt")}
    assert found == {("vision_encoder", profile) for profile in PROFILES}
    assert BEAM_SEARCH.keys() == set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("model", ["vision_encoder", "beam_search"])
def test_a_profile_is_the_same_model_on_a_gpu(model: str, profile: str) -> None:
    cpu, gpu = parsed(MODELS / model / "config.pbtxt"), config(model, profile)
    assert gpu.name == model
    assert gpu.version_policy == cpu.version_policy
    assert [group.kind for group in gpu.instance_group] == [ModelInstanceGroup.KIND_GPU]
    if gpu.backend == "onnxruntime":
        # Triton's backend takes no -1 where the graph has a size, so it reads inputs and outputs from the graph.
        assert not gpu.input
        assert not gpu.output
    else:
        # A plan has the inputs that it has.
        assert list(gpu.input) == [one for one in cpu.input if gpu.backend == "python" or one.name != "arrival"]
        assert list(gpu.output) == list(cpu.output)
    if gpu.backend == "python":
        assert given(gpu).keys() - {"tensorrt_cache"} == given(cpu).keys()
        assert given(gpu)["execution_provider"] in sessions.PROVIDERS


def test_tensors_are_the_exports(demo_export: Path) -> None:
    graph = onnx.load(demo_export / "vision_encoder.onnx", load_external_data=False).graph
    tensors = {tensor.name: tensor.type.tensor_type for tensor in (*graph.input, *graph.output)}
    for profile in ("cuda-python", "tensorrt"):
        found = config("vision_encoder", profile)
        named = {io.name: io for io in (*found.input, *found.output)}
        assert (named.pop("arrival", None) is None) == (profile == "tensorrt")
        assert named.keys() == tensors.keys()
        for name, io in named.items():
            kind = ModelConfig.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[io.data_type].name
            assert TYPES[kind] == tensors[name].elem_type
            # The batch is not in `dims`.
            shape = [dimension.dim_value for dimension in tensors[name].shape.dim[1:]]
            assert len(io.dims) == len(shape)
            assert all(dim in (-1, size) for dim, size in zip(io.dims, shape, strict=True))


def test_files_are_those_that_a_release_has() -> None:
    for profile in ("cuda", "tensorrt-ep"):
        assert config("vision_encoder", profile).default_model_filename in FILES["vision_encoder"]
    plan = config("vision_encoder", "tensorrt")
    assert plan.platform == "tensorrt_plan"
    assert (plan.default_model_filename,) == OPTIONAL["vision_encoder"] == (tensorrt.PLAN,)
    assert plan.max_batch_size == tensorrt.BATCH
    assert max(spec.batch_size for spec in plan.optimization.cuda.graph_spec) == tensorrt.BATCH


@pytest.mark.parametrize(("profile", "same"), [("cuda-python", "cuda"), ("tensorrt-ep", "tensorrt")])
def test_beam_search_is_the_same_whatever_runs_the_vision_encoder(profile: str, same: str) -> None:
    assert config("beam_search", profile) == config("beam_search", same)


@pytest.fixture
def repository(demo_export: Path, tmp_path: Path) -> Path:
    install(demo_export, tmp_path / "models")
    return tmp_path / "models"


def change(path: Path, **parameters: str) -> None:
    found = parsed(path)
    for name, value in parameters.items():
        found.parameters[name].string_value = value
    path.write_text(text_format.MessageToString(found))


def rows(repository: Path) -> str:
    return given(parsed(repository / "beam_search" / "config.pbtxt"))["rows"]


def test_a_profile_is_what_config_pbtxt_says_and_what_was_set_by_hand_is_kept(repository: Path) -> None:
    beam_search = repository / "beam_search" / "config.pbtxt"
    change(beam_search, rows="12")
    startup.prepare(Repository(repository), "cuda")
    assert Repository(repository).profile == "cuda"
    assert rows(repository) == given(config("beam_search", "cuda"))["rows"]
    assert parsed(repository / "vision_encoder" / "config.pbtxt").backend == "onnxruntime"
    assert parsed(repository / "preprocess" / "config.pbtxt") == parsed(MODELS / "preprocess" / "config.pbtxt")
    change(beam_search, rows="48")
    startup.prepare(Repository(repository))
    assert rows(repository) == "48"
    startup.prepare(Repository(repository), "cpu")
    assert (Repository(repository).profile, rows(repository)) == ("cpu", "12")
    assert parsed(repository / "vision_encoder" / "config.pbtxt").backend == "python"
    startup.prepare(Repository(repository), "cuda")
    assert rows(repository) == "48"


def test_a_release_stays_of_the_profile_and_touches_no_other_file(
    repository: Path, demo_export: Path, tmp_path: Path
) -> None:
    """Triton would take a change in configs/ for a change of every version."""
    startup.prepare(Repository(repository), "tensorrt", engine_cache=tmp_path / "engines")
    before = {path: path.stat().st_mtime_ns for path in repository.glob("*/configs/*")}
    export = Path(shutil.copytree(demo_export, tmp_path / "export"))
    (export / "vision_encoder.plan").write_bytes(b"for this GPU")
    release = install(export, repository)
    assert release.models["vision_encoder"] == 2
    assert (repository / "vision_encoder" / "2" / "vision_encoder.plan").read_bytes() == b"for this GPU"
    found = parsed(repository / "vision_encoder" / "config.pbtxt")
    assert (found.platform, list(found.version_policy.specific.versions)) == ("tensorrt_plan", [2])
    assert before
    assert {path: path.stat().st_mtime_ns for path in repository.glob("*/configs/*")} == before


def test_a_profile_that_a_kill_left_half_way_is_finished(repository: Path) -> None:
    install_config = configs.write_model
    done: list[Path] = []

    def killed(model: Path, *rest: object) -> None:
        done.append(model)
        if len(done) == 3:
            raise KeyboardInterrupt
        install_config(model, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            startup.prepare(Repository(repository), "cuda")
    assert parsed(repository / "beam_search" / "config.pbtxt").instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    startup.prepare(Repository(repository))
    assert parsed(repository / "beam_search" / "config.pbtxt").instance_group[0].kind == ModelInstanceGroup.KIND_GPU


def test_a_profile_does_not_change_under_a_server_or_another_command(repository: Path, demo_export: Path) -> None:
    here = Repository(repository)
    with startup.served(here):
        startup.prepare(here)
        startup.prepare(here, "cpu")
        install(demo_export, repository)
        refused = r"a server is running on .*; stop it to change its profile or its cache"
        with pytest.raises(ValueError, match=refused):
            startup.prepare(here, "cuda")
        with pytest.raises(ValueError, match=refused):
            install(demo_export, repository, profile="cuda")
        with pytest.raises(ValueError, match=refused):
            startup.prepare(here, response_cache=True)
        assert not here.response_cache
    with here.locked(), pytest.raises(ValueError, match=r"another command is at work on .*; start again"):
        startup.prepare(Repository(repository), "cuda")
    assert here.profile == "cpu"


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_profile_of_ones_own_is_taken_as_it_stands(repository: Path, first: str) -> None:
    startup.prepare(Repository(repository), first)
    own = repository / "beam_search" / "configs" / "small.pbtxt"
    own.parent.mkdir(exist_ok=True)
    shutil.copy(MODELS / "beam_search" / "config.pbtxt", own)
    change(own, rows="6", of_somebodys_own="1")
    text = own.read_text()
    startup.prepare(Repository(repository), "small")
    found = given(parsed(repository / "beam_search" / "config.pbtxt"))
    assert (found["rows"], found["of_somebodys_own"]) == ("6", "1")
    # Models without a config for it take the plain one.
    assert parsed(repository / "vision_encoder" / "config.pbtxt").backend == "python"
    assert Repository(repository).profile == "small"
    startup.prepare(Repository(repository), "cpu")
    assert own.read_text() == text
    own.write_text(text.replace('"6"', '"9"'))
    startup.prepare(Repository(repository), "small")
    assert rows(repository) == "9"


def test_a_profile_of_ones_own_from_before_gets_what_it_lacks(repository: Path) -> None:
    plain = parsed(MODELS / "preprocess" / "config.pbtxt")
    before = parsed(MODELS / "preprocess" / "config.pbtxt")
    del before.parameters["response_cache"], before.output[-1]
    before.parameters["max_waiting"].string_value = "7"
    own = repository / "preprocess" / "configs" / "mine.pbtxt"
    own.parent.mkdir()
    own.write_text(text_format.MessageToString(before))
    startup.prepare(Repository(repository), "mine")
    found = parsed(repository / "preprocess" / "config.pbtxt")
    assert [one.name for one in found.output] == [one.name for one in plain.output]
    assert given(found) == given(plain) | {"max_waiting": "7", "profile": "mine"}


def test_what_an_earlier_release_shipped_is_nobodys_choice(repository: Path) -> None:
    path = repository / "preprocess" / "config.pbtxt"
    for before, after in (("100", "40"), ("99", "99")):
        change(path, max_megapixels=before)
        startup.prepare(Repository(repository))
        assert given(parsed(path))["max_megapixels"] == after


def test_a_first_release_can_name_its_profile(demo_export: Path, tmp_path: Path) -> None:
    install(demo_export, tmp_path / "models", profile="cuda-python")
    assert given(parsed(tmp_path / "models" / "vision_encoder" / "config.pbtxt"))["execution_provider"] == "cuda"


def test_a_profile_that_there_is_not(repository: Path, demo_export: Path, tmp_path: Path) -> None:
    message = r"no profile 'h100'; there are cpu, cuda, cuda-python, tensorrt, tensorrt-ep"
    with pytest.raises(ValueError, match=message):
        startup.prepare(Repository(repository), "h100")
    with pytest.raises(ValueError, match=message):
        install(demo_export, tmp_path / "others", profile="h100")
    assert not (tmp_path / "others").exists()


def test_a_repository_that_cannot_be_written_is_served_as_it_is(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    startup.prepare(Repository(repository))
    startup.prepare(Repository(repository), "cpu")
    with pytest.raises(ValueError, match=r"is not made for --profile cuda, and can't be written: start"):
        startup.prepare(Repository(repository), "cuda")
    startup.prepare(Repository(repository), engine_cache=Path("engines"))


def test_engines_have_a_place_in_a_repository_that_cannot_be_written(
    demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(demo_export, tmp_path / "models", profile="tensorrt-ep")
    repository = Repository(tmp_path / "models")
    startup.prepare(repository, engine_cache=tmp_path / "engines")
    monkeypatch.setattr("os.access", lambda *_: False)
    startup.prepare(repository)
    startup.prepare(repository, engine_cache=tmp_path / "engines")
    with pytest.raises(ValueError, match=r"is not made for --engine-cache /elsewhere, and can't be written: start"):
        startup.prepare(repository, engine_cache=Path("/elsewhere"))
    (tmp_path / "engines").chmod(0o777)
    with pytest.raises(ValueError, match=r"engines, where TensorRT's engines are kept, can be written by others"):
        startup.prepare(repository)


@pytest.mark.server
def test_a_profile_of_ones_own_is_served(repository: Path) -> None:
    own = repository / "beam_search" / "configs" / "small.pbtxt"
    own.parent.mkdir()
    shutil.copy(repository / "beam_search" / "config.pbtxt", own)
    change(own, rows="6")
    startup.prepare(Repository(repository), "small")
    with running(repository) as server:
        assert figures(server.metrics_url)["florence2_rows_free"] == 6


@pytest.mark.server
def test_without_a_gpu_the_server_says_so(repository: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    startup.prepare(Repository(repository), "cuda-python")
    with TritonServer(repository) as server, pytest.raises(ServerError, match=r"beam_search .* unsupported gpu id 0"):
        server.wait_ready()


def test_without_cuda_onnxruntime_is_not_left_to_the_cpu(demo_export: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(
        ValueError, match="cuda: this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu"
    ):
        sessions.session(demo_export / "encoder.onnx", "cuda")


@pytest.mark.parametrize("profile", ["cuda", "tensorrt", "tensorrt-ep"])
def test_the_wheels_server_has_no_backend_for_a_gpu(repository: Path, profile: str, tmp_path: Path) -> None:
    startup.prepare(Repository(repository), profile, engine_cache=tmp_path / "engines")
    with pytest.raises(ServerError, match=r"which nvidia-pytriton's server lacks: .* --profile cuda-python"):
        TritonServer(repository).start()


def test_an_execution_provider_that_is_none(demo_export: Path) -> None:
    with pytest.raises(ValueError, match="execution_provider is one of cpu, cuda, tensorrt, not 'gpu'"):
        sessions.session(demo_export / "encoder.onnx", "gpu")
