"""A checkpoint, its export and a server asked the same questions: the same predictions, whatever else is in flight."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO_CHECKPOINT
from florence2_client import ServerRefused, Text
from florence2_data.record import Example, Problem
from florence2_evaluation import served_model
from florence2_evaluation.model_io import predicted
from florence2_evaluation.onnx_model import OnnxModel
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question, questions
from florence2_evaluation.score import score
from florence2_evaluation.served_model import ServedModel
from florence2_evaluation.torch_model import TorchModel
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import sizes_of
from florence2_export.parity import reference_features, reference_generate
from florence2_release.tritonserver import ServerError, find_tritonserver
from peft import LoraConfig, get_peft_model
from serving import serve

from florence2.answers import instances
from florence2.images import Resizer, decode
from florence2.prompts import PromptEncoder
from florence2.tasks import TASKS

PICTURES = DEMO_CHECKPOINT.parent / "pictures"
TRUTH = json.loads((PICTURES / "truth.json").read_text())
DETECT = TASKS["<OD>"].prompt
"""What the encoder reads for <OD>: sent as it is, a prompt of one's own whose answer is boxes."""
QUESTIONS = [
    Question(PICTURES / name, prompt, [answer])
    for name, truth in TRUTH.items()
    for prompt, answer in [*truth["answers"].items(), (DETECT, truth["answers"]["<OD>"])]
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(DEMO_CHECKPOINT))


@pytest.fixture(scope="module")
def answers(checkpoint: Checkpoint) -> list[Prediction]:
    return list(TorchModel(checkpoint).predict(QUESTIONS))


def assert_same(found: Sequence[Prediction], expected: Sequence[Prediction]) -> None:
    """Equal, scores within 1e-3."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert _without_scores(one) == _without_scores(other)
        np.testing.assert_allclose(_scores(one), _scores(other), atol=1e-3)


def _values(prediction: Prediction) -> list[Any]:
    return [*prediction.answer.values(), prediction.regions]


def _scores(prediction: Prediction) -> list[float]:
    values = [value for value in _values(prediction) if isinstance(value, dict)]
    return [score for value in values for *_, score in instances(value)]


def _without_scores(prediction: Prediction) -> list[Any]:
    held = [
        [row[:3] for row in instances(value)] if isinstance(value, dict) else value for value in _values(prediction)
    ]
    return [prediction.image, prediction.size, prediction.prompt, prediction.references, prediction.text, held]


def test_predictions_say_what_was_asked(answers: list[Prediction]) -> None:
    assert [(p.image, p.prompt, p.references) for p in answers] == [
        (str(q.image), q.prompt, q.references) for q in QUESTIONS
    ]
    assert all(p.size == tuple(TRUTH[Path(p.image).name]["size"]) for p in answers)
    # The demo checkpoint knows these pictures.
    found = {one.name: one.value for one in score(answers)}
    assert found["<OD> AP50"] > 0.99
    assert found["boxes AP50"] == found["<OD> AP50"]
    assert found["<CAPTION> exact"] == found["<OCR> exact"] == 1


def test_an_export_gives_the_checkpoints_predictions(answers: list[Prediction], demo_export: Path) -> None:
    assert_same(list(OnnxModel(demo_export).predict(QUESTIONS)), answers)


def test_so_it_does_with_other_settings(checkpoint: Checkpoint, demo_export: Path) -> None:
    for settings in ({"num_beams": 1}, {"num_beams": 2, "max_new_tokens": 6}):
        expected = list(TorchModel(checkpoint, batch_size=5, **settings).predict(QUESTIONS[:12]))
        assert_same(list(OnnxModel(demo_export, in_flight=3, **settings).predict(QUESTIONS[:12])), expected)
    # Six and the decoder start.
    assert max(len(checkpoint.tokenizer.encode(p.text, add_special_tokens=False).ids) for p in expected) == 7


def test_settings_out_of_range_are_refused(checkpoint: Checkpoint, demo_export: Path) -> None:
    with pytest.raises(ValueError, match="num_beams must be from 1"):
        TorchModel(checkpoint, num_beams=9)
    with pytest.raises(ValueError, match="max_new_tokens"):
        OnnxModel(demo_export, max_new_tokens=100_000)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_does_not_change_the_answers(
    checkpoint: Checkpoint, answers: list[Prediction], batch_size: int
) -> None:
    model = TorchModel(checkpoint, batch_size=batch_size)
    backwards = list(model.predict(QUESTIONS[::-1]))
    assert_same(backwards[::-1], answers)


def test_what_is_in_flight_does_not_change_the_answers(demo_export: Path, answers: list[Prediction]) -> None:
    backwards = list(OnnxModel(demo_export, in_flight=2).predict(QUESTIONS[::-1]))
    assert_same(backwards[::-1], answers)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_are_those_of_transformers(checkpoint: Checkpoint, num_beams: int) -> None:
    question = QUESTIONS[0]
    (found,) = TorchModel(checkpoint, num_beams=num_beams).predict([question])
    image = decode(question.image.read_bytes())
    features = reference_features(checkpoint, Resizer(checkpoint.preprocessor)(image)[None])[0]
    prompt = PromptEncoder(checkpoint.tokenizer, sizes_of(checkpoint)).encode(question.prompt)
    output = reference_generate(checkpoint.model, features, prompt, num_beams=num_beams)
    beams = output.beam_indices if num_beams > 1 else None
    logprobs = checkpoint.model.compute_transition_scores(
        output.sequences, output.scores if num_beams > 1 else output.logits, beams, normalize_logits=num_beams == 1
    )[0]
    tokens = [checkpoint.tokenizer.id_to_token(index) for index in output.sequences[0, 1:].tolist()]
    at_locations = [value for token, value in zip(tokens, logprobs.tolist(), strict=True) if token.startswith("<loc_")]
    assert found.text == checkpoint.tokenizer.decode(output.sequences[0].tolist(), skip_special_tokens=False)
    assert len(at_locations) % 4 == 0 < len(at_locations)
    expected = np.exp(np.array(at_locations).reshape(-1, 4).mean(axis=1))
    np.testing.assert_allclose(found.answer["<OD>"]["scores"], expected, atol=1e-5)


def test_boxes_that_answer_a_prompt_of_ones_own_have_scores(answers: list[Prediction]) -> None:
    by_prompt = {(p.image, p.prompt): p for p in answers}
    for (image, prompt), own in by_prompt.items():
        if prompt == DETECT:
            assert own.regions == by_prompt[image, "<OD>"].answer["<OD>"]
            assert own.answer == {DETECT: own.text.removeprefix("</s><s>").removesuffix("</s>")}
        else:
            assert own.regions is None


def test_a_model_in_training_answers_like_one_that_is_not(answers: list[Prediction]) -> None:
    checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
    model: Any = checkpoint.model.train()
    model.model.vision_tower.eval()
    assert model.model.language_model.encoder.layers[0].training
    model.model.language_model.encoder.dropout = model.model.language_model.decoder.dropout = 0.5
    assert_same(list(TorchModel(checkpoint).predict(QUESTIONS[:6])), answers[:6])
    assert model.training
    assert model.model.language_model.encoder.layers[0].training
    assert not model.model.vision_tower.training


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
def test_a_model_with_an_adapter(answers: list[Prediction], task_type: str | None) -> None:
    checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task_type)
    checkpoint.model = get_peft_model(checkpoint.model, adapter)
    # A new adapter adds nothing.
    assert_same(list(TorchModel(checkpoint).predict(QUESTIONS[:6])), answers[:6])
    for name, parameter in checkpoint.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    assert [p.text for p in TorchModel(checkpoint).predict(QUESTIONS[:6])] != [p.text for p in answers[:6]]


def test_a_model_in_half_precision(answers: list[Prediction]) -> None:
    checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
    checkpoint.model.to(torch.bfloat16)
    found = list(TorchModel(checkpoint).predict(QUESTIONS))
    assert {one.name: one.value for one in score(found)}["<OD> AP50"] > 0.99


def test_several_references_are_one_question(checkpoint: Checkpoint) -> None:
    scene, word = PICTURES / "scene-1.png", PICTURES / "word-1.png"
    rows = [(scene, "a star"), (scene, "two stars"), (word, "a word"), (scene, "stars")]
    examples = [Example(image, "<CAPTION>", caption, "") for image, caption in rows]
    model = TorchModel(checkpoint)
    assert [p.references for p in model.predict(questions(examples))] == [
        ["a star", "two stars"],
        ["a word"],
        ["stars"],
    ]
    assert [p.references for p in model.predict(questions(examples, limit=2))] == [["a star", "two stars"], ["a word"]]
    assert list(model.predict([])) == []


def test_what_cannot_be_asked_is_reported(checkpoint: Checkpoint, demo_export: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((PICTURES / "scene-1.png").read_bytes()[:3000])
    whole = QUESTIONS[0]
    bad = [
        Question(tmp_path / "missing.png", "<OD>", [""]),
        Question(tmp_path / "broken.png", "<OD>", [""]),
        Question(whole.image, "<OD>cars", [""]),
    ]
    for model in (TorchModel(checkpoint, batch_size=2), OnnxModel(demo_export)):
        problems: list[Problem] = []
        found = list(model.predict([bad[0], whole, *bad[1:], whole], problems.append))
        assert [p.prompt for p in found] == [whole.prompt] * 2
        assert [problem.where for problem in problems] == [f"{one.image}, {one.prompt}" for one in bad]
        words = [problem.message for problem in problems]
        assert words[0].startswith("the picture can't be read")
        assert words[1].startswith("the image is damaged or cut short")
        assert words[2].startswith("<OD> takes no text")
        with pytest.raises(ValueError, match=r"missing.png, <OD>: the picture can't be read"):
            list(model.predict(bad))


class FakeClient:
    """A server that refuses one prompt, and is gone at another."""

    def __init__(self, url: str, **_: Any) -> None:
        pass

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, prompt: str, image: bytes, **_: Any) -> Text:
        if prompt in STATUS:
            raise ServerRefused("no", STATUS[prompt])
        nothing = np.zeros(1, np.int64)
        logprobs = np.zeros(0, np.float32)
        return Text(prompt, {prompt: "red"}, "</s>red</s>", nothing, logprobs, 0.0, "stop", "1", image)


STATUS = {"refused": "INVALID_ARGUMENT", "gone": "UNAVAILABLE"}


def test_what_a_server_refuses_is_reported_and_a_server_that_is_gone_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_model, "Florence2Client", FakeClient)
    image = PICTURES / "scene-1.png"
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:3000])
    asked = [
        *(Question(path, "colour?", ["red"]) for path in (tmp_path / "broken.png", image)),
        *(Question(image, prompt, ["red"]) for prompt in ("refused", "and now?")),
    ]
    problems: list[Problem] = []
    found = list(ServedModel("server", in_flight=2).predict(asked, problems.append))
    assert [p.prompt for p in found] == ["colour?", "and now?"]
    assert [problem.where for problem in problems] == [f"{tmp_path / 'broken.png'}, colour?", f"{image}, refused"]
    with pytest.raises(ServerRefused, match=r"scene-1.png, gone: no"):
        list(ServedModel("server").predict([Question(image, "gone", ["red"])], problems.append))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"scene-1.png.*127.0.0.1:1"):
        list(ServedModel("127.0.0.1:1").predict(QUESTIONS[:3]))


def test_a_location_that_is_no_token_takes_the_scores_of_that_answer_alone() -> None:
    question = Question(Path("a.png"), "find it", ["<loc_1><loc_2><loc_3><loc_4>"])
    logprobs = np.full(6, -0.5)

    def regions(text: str, *token_ids: int) -> dict[str, Any] | None:
        ids = np.array([2, *token_ids])
        return predicted(question, (1000, 1000), text, {"find it": text}, ids, logprobs[: len(ids) - 1]).regions

    written = "<loc_1><loc_2><loc_3><loc_4>"
    found = regions(written, 0, 101, 102, 103, 104, 2)
    assert found == {"bboxes": [[1.5, 2.5, 3.5, 4.5]], "labels": [""], "scores": [pytest.approx(np.exp(-0.5))]}
    labelled = regions("cat" + written, 50, 101, 102, 103, 104, 2)
    assert labelled is not None
    assert labelled["labels"] == ["cat"]
    assert regions("<loc_1><loc_2><loc_3><loc_1000>", 0, 101, 102, 103, 60, 61) is None
    assert regions("<loc_1><loc_2><loc_3><loc_007>", 0, 101, 102, 103, 60, 61) is None
    assert regions("<loc_1><loc_2>", 0, 101, 102, 2) is None


def _no_server() -> bool:
    try:
        find_tritonserver()
    except ServerError:
        return True
    return False


@pytest.mark.server
@pytest.mark.skipif(_no_server(), reason="neither tritonserver nor nvidia-pytriton is installed")
def test_a_server_gives_the_checkpoints_predictions(
    answers: list[Prediction], demo_export: Path, tmp_path: Path
) -> None:
    with serve(demo_export, tmp_path) as server:
        assert_same(list(ServedModel(server.grpc_url).predict(QUESTIONS)), answers)
        short = list(ServedModel(server.grpc_url, num_beams=1, max_new_tokens=6, in_flight=2).predict(QUESTIONS[:3]))
    assert_same(short, list(OnnxModel(demo_export, num_beams=1, max_new_tokens=6).predict(QUESTIONS[:3])))
