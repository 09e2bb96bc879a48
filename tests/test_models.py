"""Every model.py of the model repository, without a server."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import fake_triton
import numpy as np
import pytest
from fake_triton import Request, load_model, run
from florence2_release.install import install
from PIL import Image


@pytest.fixture(scope="module")
def repository(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "repository"
    install(demo_export, folder)
    return folder


def png(width: int = 60, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, format="PNG")
    return buffer.getvalue()


def request(image: bytes, prompt: str) -> Request:
    return Request(image=np.array([image], np.object_), prompt=np.array([prompt.encode()], np.object_))


def code_and_message(response: fake_triton.InferenceResponse) -> tuple[str, str]:
    error = response.error()
    assert error is not None
    return error.code(), error.message()


def test_preprocess_answers_the_good_requests_of_a_batch_and_refuses_the_bad(repository: Path) -> None:
    model = load_model(repository, "preprocess")
    responses = run(
        model,
        [
            request(png(), "<OD>"),
            request(b"<html>", "<OD>"),
            request(base64.b64encode(png()), "<CAPTION>"),
            request(png(), "<CAPTOIN>x"),
            request(png(), "<caption>"),
            Request(image=np.array([png()], np.object_), prompt=np.array([b"\xff\xfe"], np.object_)),
        ],
    )
    first, third = responses[0].tensors(), responses[2].tensors()
    assert first["image_size"].tolist() == [[60, 40]]
    assert first["pixels"].dtype == np.uint8
    assert first["pixels"].shape == (1, 96, 96, 3)
    assert first["pixels"][0, 5, 5].tolist() == [0, 128, 128]
    assert (third["pixels"] == first["pixels"]).all()
    assert first["input_ids"].shape[0] == 1
    assert code_and_message(responses[1])[0] == "INVALID_ARG"
    assert "can't be read" in code_and_message(responses[1])[1]
    # Two letters off: it may be a task of a fine-tune.
    assert responses[3].error() is None
    assert code_and_message(responses[4]) == ("INVALID_ARG", "unknown task <caption>; did you mean <CAPTION>?")
    assert code_and_message(responses[5]) == ("INVALID_ARG", "the prompt is not UTF-8")


def test_limits_come_from_the_config(repository: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    config = copy / "preprocess" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "100"', 'string_value: "0.001"'))
    (response,) = run(load_model(copy, "preprocess"), [request(png(), "<OD>")])
    assert code_and_message(response) == ("INVALID_ARG", "the image has 60 x 40 pixels; 0.001 megapixels are allowed")


def test_features_tokens_and_answer(repository: Path) -> None:
    preprocess, vision, search, postprocess = (
        load_model(repository, name) for name in ("preprocess", "vision_encoder", "beam_search", "postprocess")
    )
    (prepared,) = run(preprocess, [request(png(), "<OD>")])
    inputs = prepared.tensors()
    (seen,) = run(vision, [Request(pixels=inputs["pixels"][0])])
    features = seen.tensors()["image_features"]
    assert features.shape == (1, 145, 128)
    asked: dict[str, Any] = {"image_features": features[0], "input_ids": inputs["input_ids"][0]}
    five = Request(**asked, max_new_tokens=np.array([5], np.int32), num_beams=np.array([2], np.int32))
    many = Request(**asked, num_beams=np.array([9], np.int32))
    answered, refused = run(search, [five, many])
    generated = answered.tensors()
    length = generated["token_ids"].shape[1]
    assert generated["token_ids"][0, 0] == 2
    assert 2 <= length <= 6
    assert generated["token_logprobs"].shape == (1, length - 1)
    assert generated["sequence_score"].shape == generated["finish_reason"].shape == (1, 1)
    assert code_and_message(refused) == ("INVALID_ARG", "num_beams must be from 1 to 8, not 9")
    (final,) = run(
        postprocess,
        [
            Request(
                prompt=np.array([b"<OD>"], np.object_),
                image_size=inputs["image_size"][0],
                token_ids=generated["token_ids"][0],
                token_logprobs=generated["token_logprobs"][0],
            )
        ],
    )
    answer = json.loads(final.tensors()["answer"][0, 0])
    assert set(answer["<OD>"]) == {"bboxes", "labels", "scores"}
    assert final.tensors()["text"][0, 0].startswith("</s><s>")


def test_an_exception_fails_its_request_alone(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vision = load_model(repository, "vision_encoder")
    good = Request(pixels=np.zeros((96, 96, 3), np.uint8))
    bad = Request(pixels=np.zeros((10, 10, 3), np.uint8))
    responses = run(vision, [bad, good])
    assert code_and_message(responses[0])[0] == "INTERNAL"
    assert responses[1].error() is None
    assert "failed" in capsys.readouterr().err
