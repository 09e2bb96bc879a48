"""Training: the loss, what stays frozen, steps that can be killed anywhere, features that are computed once."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints as make
import pytest
import runs
import torch
from accelerate.state import AcceleratorState
from florence2_cli import main
from florence2_export.pixel_values import normalised
from florence2_training import features as features_module
from florence2_training import loop, run_state, trainable
from florence2_training.adapters import add_adapters
from florence2_training.features import FeatureCache, PictureGroups, computer, open_cache
from florence2_training.objective import IGNORED, Florence2Learner, checkpoint_activations
from florence2_training.recipe import PARTS, Lora, Recipe, Source, save_recipe
from florence2_training.run_state import Progress
from florence2_training.sampler import Batch
from florence2_training.train import Training, train
from florence2_training.validation import Judge
from torch import Tensor, nn

EVERYTHING = Batch(list(range(len(runs.SAMPLES))))


def learner_of(checkpoint: Any) -> Florence2Learner:
    return Florence2Learner(checkpoint.model, checkpoint.preprocessor)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: name + text
        )


# --- the loss ---


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model")
    batch = runs.batches(checkpoint, tmp_path / "data")[EVERYTHING]
    model: Any = checkpoint.model
    assert (batch["attention_mask"] == 0).any()
    assert (batch["labels"] == IGNORED).any()
    assert batch["pixels"].shape == (4, 64, 64, 3)
    assert batch["picture_of"].tolist() == [0, 0, 1, 2, 1, 3, 2]
    found = learner_of(checkpoint)(batch)
    found.backward()
    own = gradients(model)
    model.zero_grad()

    # As HF's users do it: <image> tokens before the prompt, one picture per sample.
    images = torch.full((len(runs.SAMPLES), 5), model.config.image_token_id)
    pixels = normalised(batch["pixels"], checkpoint.preprocessor)[batch["picture_of"]]
    expected = model(
        input_ids=torch.cat([images, batch["input_ids"]], dim=1),
        attention_mask=torch.cat([torch.ones_like(images), batch["attention_mask"]], dim=1),
        pixel_values=pixels,
        labels=batch["labels"],
    ).loss
    tokens = (batch["labels"] != IGNORED).sum()
    assert (
        float(batch["weight"])
        == tokens
        == sum(len(checkpoint.tokenizer.encode(answer).ids) for _, _, answer in runs.SAMPLES)
    )
    torch.testing.assert_close(found, expected * tokens, rtol=1e-6, atol=0)
    (expected * tokens).backward()
    assert_close(own, gradients(model), atol=1e-4)
    assert len(own) == len(list(model.parameters()))


def test_a_batch_loses_what_its_samples_lose_alone(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model")
    batches, learner = runs.batches(checkpoint, tmp_path / "data"), learner_of(checkpoint)
    with torch.no_grad():
        together = learner(batches[EVERYTHING])
        alone = [learner(batches[Batch([index])]) for index in range(len(runs.SAMPLES))]
        # What stands in the pads is not seen.
        other = batches[EVERYTHING]
        other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, 77)
        assert torch.equal(learner(other), together)
        # But what stands before them is: an answer is given to a question.
        other["input_ids"][0, 1] = 77
        assert not torch.equal(learner(other), together)
    torch.testing.assert_close(together, sum(alone), rtol=1e-6, atol=0)
    assert len({round(float(one), 3) for one in alone}) == len(alone)


def test_a_batch_that_does_not_count_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model")
    batch = runs.batches(checkpoint, tmp_path / "data")[Batch([1], counts=False)]
    loss = learner_of(checkpoint)(batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(batch["weight"]) == 0
    found = gradients(checkpoint.model)
    assert len(found) == len(list(checkpoint.model.parameters()))
    assert not any(tensor.any() for tensor in found.values())


def test_one_sample_is_learned_by_heart(tmp_path: Path) -> None:
    answer = "cat<loc_1><loc_2><loc_300><loc_400>the dog<loc_5><loc_6><loc_700><loc_999>"
    data = runs.lines(tmp_path / "one.jsonl", [(1, "<OD>", answer)])
    recipe = runs.recipe(tmp_path, train=[Source(data=str(data))], max_steps=120, learning_rate=2e-2, save_steps=500)
    recipe.lr_scheduler_type, recipe.logging_steps = "linear", 500
    train(recipe)
    from florence2_export.checkpoint import load_checkpoint

    learned = load_checkpoint(str(tmp_path / "run" / "checkpoint-0000120"))
    picture = runs.pictures(tmp_path / "pictures")[1]
    assert runs.greedy(learned.model, learned, picture, "<OD>") == f"</s><s>{answer}</s>"
    before = runs.loaded(tmp_path / "before")
    assert answer not in runs.greedy(before.model, before, picture, "<OD>")


# --- frozen ---


@pytest.mark.parametrize(
    "given",
    [
        {"freeze": ["vision"], "cache_features": False},
        {"freeze": ["vision", "projector", "embeddings"]},
        {"freeze": ["encoder", "decoder"]},
        {"method": "lora", "lora": Lora(targets="text", dropout=0.1)},
        {"method": "lora", "lora": Lora(targets="all")},
    ],
)
def test_frozen_means_frozen(tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs.native(tmp_path / "model", dropout=0.1, drop_path=0.1)
    recipe = runs.recipe(tmp_path, **given, weight_decay=0.5, learning_rate=1e-2)
    held: list[Training] = []
    modes: list[dict[str, set[bool]]] = []
    steps = loop._step

    def step(*arguments: Any) -> Any:
        model = held[0].model
        modes.append(
            {
                part: {found.training for found in module.modules()}
                for part, module in trainable.modules_of(model).items()
            }
        )
        return steps(*arguments)

    fit = Training.fit
    monkeypatch.setattr(Training, "fit", lambda self, *rest: (held.append(self), fit(self, *rest))[1])
    monkeypatch.setattr(loop, "_step", step)
    train(recipe)
    before = runs.loaded(tmp_path / "again", dropout=0.1, drop_path=0.1).model.state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in held[0].model.state_dict().items()}
    adapters = {name for name in after if "lora_" in name}
    changed = {name for name in after.keys() - adapters if not torch.equal(after[name], before[name])}
    assert after.keys() - adapters == before.keys()
    trained = {"encoder", "decoder"} if given.get("method") == "lora" else set(PARTS) - set(given["freeze"])
    if given.get("method") == "lora":
        assert not changed
        assert all(after[name].any() for name in adapters if ".lora_B." in name)
        trained |= {"vision", "projector"} if given["lora"].targets == "all" else set()
    else:
        # lm_head and the copies are the embeddings.
        of = {
            name: "embeddings" if name.endswith(("embed_tokens.weight", "lm_head.weight")) else trainable.part_of(name)
            for name in before
        }
        expected = {name for name in before if of[name] in trained and not name.endswith("pos_idx_to_embed")}
        assert changed == expected
    assert len(modes) == 3
    for mode in modes:
        for part in PARTS:
            assert mode[part] == {part in trained}, part


def test_a_frozen_part_drops_nothing(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model", dropout=0.5, drop_path=0.5, trained=False)
    batch = runs.batches(checkpoint, tmp_path / "data")[EVERYTHING]
    trainable.freeze(checkpoint.model, ["vision", "encoder", "decoder"])
    trainable.set_modes(checkpoint.model)
    learner = learner_of(checkpoint)
    assert torch.equal(learner(batch), learner(batch))
    trainable.freeze(checkpoint.model, ["projector", "encoder", "decoder"])
    trainable.set_modes(checkpoint.model)
    learner = learner_of(checkpoint)
    assert not torch.equal(learner(batch), learner(batch))


def test_a_frozen_weight_that_changes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Training.fit

    def spoilt(self: Training, *rest: Any) -> Progress:
        progress = fit(self, *rest)
        with torch.no_grad():
            self.model.model.vision_tower.convs[0].conv.bias[0] += 1e-6
        return progress

    monkeypatch.setattr(Training, "fit", spoilt)
    with pytest.raises(RuntimeError, match="weights that were to stay frozen have changed"):
        train(runs.recipe(tmp_path, freeze=["vision"]))
    train(runs.recipe(tmp_path, freeze=["projector"], output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"freeze": list(PARTS)}, "freeze names every part: nothing would be trained"),
        ({"freeze": ["vision"], "learning_rates": {"vision": 1e-6}}, "learning_rates names vision, which is not"),
        ({"task_weights": {"<DOES>": 2.0}}, "task_weights: the data has no <DOES>, only"),
        (
            {"task_weights": {"<OD>": 0.0, "<CAPTION>": 0.0, "<OCR>": 0.0, "text": 0.0}},
            "task_weights leave no sample in an epoch",
        ),
    ],
)
def test_what_would_train_nothing_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(runs.recipe(tmp_path, **given))


def test_parts_have_learning_rates_of_their_own_and_norms_do_not_decay(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, learning_rates={"vision": 1e-7}, weight_decay=0.25)
    from accelerate import Accelerator

    training = Training.prepare(recipe, tmp_path / "run", Accelerator())
    groups = training.parameter_groups()
    names = {id(value): name for name, value in training.model.named_parameters()}
    seen = []
    for group in groups:
        for value in group["params"]:
            name = names[id(value)]
            seen.append(name)
            assert group["lr"] == (1e-7 if name.startswith("model.vision_tower.") else 1e-3)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "norm" in name else 0.25), name
    assert sorted(seen) == sorted(names.values())


# --- going on ---

BUSY: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "replay_share": 0.4,
    "max_steps": 7,
    "save_total_limit": 2,
    "warmup_ratio": 0.3,
    "learning_rate": 1e-3,
    "eval_steps": 2,
}
"""With replay 12 samples an epoch: 3 steps; 7 steps are two epochs and a part."""


def busy(folder: Path, name: str, **given: Any) -> Recipe:
    if not (folder / "model").exists():
        runs.native(folder / "model", dropout=0.2, drop_path=0.2)
        runs.lines(folder / "replay.jsonl", [(3, "<CAPTION>", "an old thing"), (2, "<CAPTION>", "another")])
        runs.lines(folder / "validation.jsonl", runs.SAMPLES[:3])
    return runs.recipe(
        folder,
        model=str(folder / "model"),
        output_dir=str(folder / name),
        replay=[Source(data=str(folder / "replay.jsonl"))],
        validation=[Source(data=str(folder / "validation.jsonl"))],
        **BUSY | given,
    )


METHODS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "lora", "lora": Lora(r=2, targets="all", dropout=0.2), "gradient_checkpointing": True},
]


class Broken(BaseException):
    """Caught by nothing."""


def steps_logged(run: Path) -> list[int]:
    return [line["step"] for line in runs.log(run) if "loss" in line and "learning_rate" in line]


@pytest.mark.parametrize("given", METHODS, ids=["full", "lora"])
def test_a_run_that_is_broken_off_goes_on_as_if_it_had_not_been(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(busy(tmp_path, "whole", **given))
    expected, logged = runs.weights(tmp_path / "whole"), runs.log(tmp_path / "whole")
    assert steps_logged(tmp_path / "whole") == list(range(1, 8))
    step = loop._step
    for broken in range(1, 8):
        name = f"broken-{broken}"
        taken = 0

        def breaks(*arguments: Any, broken: int = broken) -> Any:
            nonlocal taken
            taken += 1
            if taken == broken:
                raise Broken
            return step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_step", breaks)
            with pytest.raises(Broken):
                train(busy(tmp_path, name, **given, save_steps=3))
        progress = train(busy(tmp_path, name, **given, save_steps=3))
        assert progress == whole
        assert_same(runs.weights(tmp_path / name), expected)
        assert steps_logged(tmp_path / name) == list(range(1, 8))
        for one, other in zip(runs.log(tmp_path / name), logged, strict=True):
            same = one.keys() - {"pictures_per_second", "memory_gb", "seconds"}
            assert {key: one[key] for key in same} == {key: other[key] for key in same}


@pytest.mark.parametrize("own_head", [False, True])
def test_a_run_on_microsofts_layout_goes_on(tmp_path: Path, own_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = runs.model(rows=make.ROWS)
    folder, state = make.write_microsoft(tmp_path / "model", base), make.microsoft_state(base)
    if own_head:
        state["language_model.lm_head.weight"] = torch.randn(make.ROWS, 16)
        make.edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
        make.edit_json(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))
        make.write_safetensors(folder, state)
    whole = runs.recipe(tmp_path, output_dir=str(tmp_path / "whole"), learning_rate=1e-2)
    train(whole)
    expected = runs.weights(tmp_path / "whole")
    assert ("lm_head.weight" in expected) == own_head
    assert len(expected["model.language_model.shared.weight"]) == runs.ROWS
    step = loop._step
    with monkeypatch.context() as patch:
        left = iter([step])
        patch.setattr(loop, "_step", lambda *arguments: next(left)(*arguments))
        with pytest.raises(StopIteration):
            train(replace(whole, output_dir=str(tmp_path / "broken")))
    assert [path.name for path in run_state.whole_checkpoints(tmp_path / "broken")] == ["checkpoint-0000001"]
    train(replace(whole, output_dir=str(tmp_path / "broken")))
    assert_same(runs.weights(tmp_path / "broken"), expected)


def test_a_finished_run_does_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = busy(tmp_path, "run")
    progress = train(recipe)
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").glob("checkpoint-*/*"))}
    log = (tmp_path / "run" / "log.jsonl").read_text()
    monkeypatch.setattr(loop, "_step", lambda *arguments: pytest.fail("a step was taken"))
    assert train(recipe) == progress
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").glob("checkpoint-*/*"))} == before
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


def test_the_folder_of_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(tmp_path, method="lora")
    train(recipe)
    refused = [
        (replace(recipe, learning_rate=2e-3), "learning_rate was 0.001"),
        (replace(recipe, lora=Lora(r=4)), r"lora\.r was 16\)"),
        (replace(recipe, seed=3), "seed was 0"),
        (replace(recipe, train=[*recipe.train, *recipe.train]), "train was"),
    ]
    for other, message in refused:
        with pytest.raises(ValueError, match=f"is a run of another recipe.*{message}.*give another output_dir"):
            train(other)
    train(replace(recipe, features_dir=str(tmp_path / "features"), logging_steps=2, save_steps=7, save_total_limit=1))
    # A run that was moved, and started from elsewhere.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(replace(recipe, output_dir=str(tmp_path / "moved")))
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="occupied exists and is not a run; give another output_dir, or remove it"):
        train(replace(recipe, output_dir=str(tmp_path / "occupied")))


def test_a_recipe_that_came_to_nothing_can_be_mended(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, method="lora", lora=Lora(targets=["nothing"]))
    with pytest.raises(ValueError, match="matches no linear layer"):
        train(recipe)
    assert train(replace(recipe, lora=Lora())).step == 3


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, method="lora")
    train(recipe)
    begun = (tmp_path / "run" / "run.json").read_bytes()
    runs.lines(tmp_path / "train.jsonl", runs.SAMPLES[:-1])
    with pytest.raises(ValueError, match=r"was begun with another data, see its run\.json; bring that back, or"):
        train(recipe)
    runs.lines(tmp_path / "train.jsonl")
    runs.native(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="was begun with another sha256 and frozen_sha256, "):
        train(recipe)
    assert (tmp_path / "run" / "run.json").read_bytes() == begun


def test_a_folder_is_trained_in_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, step = runs.recipe(tmp_path, max_steps=1), loop._step

    def twice(*arguments: Any) -> Any:
        with pytest.raises(ValueError, match=r"another process trains in .*run; wait for it, or give another"):
            train(recipe)
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", twice)
    assert train(recipe).step == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_type": "cosinus"}, "lr_scheduler_type cosinus: "),
        ({"lr_scheduler_kwargs": {"num_circles": 2}}, "lr_scheduler_type cosine: .*num_circles"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "goes by a metric; take one that goes by steps",
        ),
        ({"learning_rates": {"vision": 1e-6}}, "learning_rates names vision, which is not trained"),
        ({"task_weights": {"<OCR_WITH_REGION>": 2.0}}, "the data has no <OCR_WITH_REGION>"),
    ],
)
def test_what_does_not_fit_is_said_before_features_are_computed(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(runs.recipe(tmp_path, **{"freeze": ["vision"], **given}))
    assert not (tmp_path / "run" / "features").exists()


def test_what_goes_wrong_in_a_worker_is_said_in_one_line(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, dataloader_num_workers=1)
    picture = runs.pictures(tmp_path / "pictures")[0]
    picture.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"\A.*0\.png: .*; `florence2 data check` finds all such pictures\Z"):
        train(recipe)


def test_rates_of_parts_are_logged(tmp_path: Path) -> None:
    given: dict[str, Any] = {"freeze": ["embeddings", "projector"], "learning_rates": {"vision": 1e-4}}
    train(runs.recipe(tmp_path, max_steps=1, lr_scheduler_type="constant", **given))
    (line,) = runs.log(tmp_path / "run")
    rates = {name: value for name, value in line.items() if name.startswith("learning_rate")}
    assert rates == {"learning_rate[vision]": 1e-4, "learning_rate[encoder]": 1e-3, "learning_rate[decoder]": 1e-3}


def test_a_relative_path_like_a_folder_of_the_run_is_the_same_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = runs.recipe(tmp_path)
    (tmp_path / "data").mkdir()
    runs.lines(tmp_path / "data" / "data.jsonl")
    # A run has a folder "data", too.
    recipe.train, recipe.output_dir = [Source(data="data", format="prefix")], "run"
    assert train(recipe) == train(recipe)


def test_a_kill_before_the_recipe_is_written_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.part").write_text("model: mo")
    assert train(runs.recipe(tmp_path)).step == 3


def _start(recipe: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.dup2(null, 1)
    torch.set_num_threads(1)
    sys.exit(main(["train", recipe]))


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    # Each is a process of its own, killed with SIGKILL; the fork server has torch imported already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["florence2_training.train", "test_loop"])
    settings: dict[str, Any] = {"max_steps": 30, "save_steps": 2, "eval_steps": 10}
    expected = train(busy(tmp_path, "whole", **settings))
    path = tmp_path / "recipe.yaml"
    save_recipe(busy(tmp_path, "killed", **settings), path)
    chance = random.Random(0)
    killed, began = 0, time.monotonic()
    run = tmp_path / "killed"
    while True:
        process = context.Process(target=_start, args=(str(path),))
        process.start()
        done = len(run_state.whole_checkpoints(run)) if run.exists() else 0
        before = steps_of_log(run)
        # Until it has taken a step more, and some milliseconds: anywhere in a step, a validation or a checkpoint.
        while killed < 6 and process.is_alive() and steps_of_log(run) <= before and time.monotonic() - began < 60:
            time.sleep(0.005)
        if killed < 6:
            process.join(chance.uniform(0, 0.15))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, done
        killed += 1
    assert killed >= 3
    assert_same(runs.weights(run), runs.weights(tmp_path / "whole"))
    assert steps_logged(run) == list(range(1, 31))
    assert train(busy(tmp_path, "killed", **settings)) == expected


def steps_of_log(run: Path) -> int:
    try:
        return (run / "log.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


# --- checkpoints ---


def saved(folder: Path, step: int, progress: Progress | None = None) -> Path:
    """A checkpoint without a model, but files like one's."""

    def save_model(scratch: Path) -> None:
        (scratch / "model.bin").write_bytes(bytes(range(100)))

    progress = progress or Progress(step=step)
    return run_state.save_checkpoint(folder, progress, save_model, {"a": torch.ones(3)}, [step])


def test_a_checkpoint_holds_what_it_was_given(tmp_path: Path) -> None:
    progress = Progress(12, 0.5, 8, 1, {4: {"loss": 1.0}, 8: {"loss": 0.5}}, True)
    folder = saved(tmp_path, 12, progress)
    assert folder == tmp_path / "checkpoint-0000012"
    states, processes = run_state.load_states(folder)
    assert run_state.load_progress(folder) == progress
    assert torch.equal(states["a"], torch.ones(3))
    assert processes == [12]
    saved(tmp_path, 3)
    assert run_state.whole_checkpoints(tmp_path) == [tmp_path / "checkpoint-0000003", folder]


def test_a_damaged_checkpoint_is_none(tmp_path: Path) -> None:
    first, last = saved(tmp_path, 1), saved(tmp_path, 2)
    files = sorted(path.name for path in last.iterdir())
    assert files == ["complete.json", "model.bin", "progress.json", "training_state.pt"]
    for name in files:
        content = (last / name).read_bytes()
        for damaged in (content[:-1], content[: len(content) // 2], b"", bytes([content[0] ^ 1]) + content[1:]):
            (last / name).write_bytes(damaged)
            assert run_state.whole_checkpoints(tmp_path) == [first], name
            assert run_state.newest_whole(tmp_path) == first
        (last / name).unlink()
        assert run_state.whole_checkpoints(tmp_path) == [first], name
        (last / name).write_bytes(content)
        assert run_state.whole_checkpoints(tmp_path) == [first, last]
    for text in ("[]", "{}", '{"files": []}', '{"files": {}}', '{"files": {"model.bin": 3}}', "null"):
        (last / "complete.json").write_text(text)
        assert run_state.whole_checkpoints(tmp_path) == [first], text


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    first = saved(tmp_path, 1)
    for name in ("checkpoint-x", ".checkpoint-0000009.part", "checkpoint-2-copy", "best"):
        shutil.copytree(first, tmp_path / name)
    (tmp_path / "checkpoint-0000003").touch()
    assert run_state.whole_checkpoints(tmp_path) == [first]


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        saved(tmp_path, step)
    run_state.prune(tmp_path, 2, best_step=3)
    assert [path.name[-1] for path in run_state.whole_checkpoints(tmp_path)] == ["3", "5", "6"]
    run_state.prune(tmp_path, 2, best_step=6)
    assert [path.name[-1] for path in run_state.whole_checkpoints(tmp_path)] == ["5", "6"]
    run_state.prune(tmp_path, 2, best_step=None)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["5", "6"]


FULL_DISK = OSError(28, "No space left on device")


def _full(*arguments: Any, **named: Any) -> None:
    raise FULL_DISK


def _half_written(state: Any, path: Any, *rest: Any, **named: Any) -> None:
    Path(path).write_bytes(b"half")
    raise FULL_DISK


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("file", ["training_state.pt", "weights", "progress.json", "complete.json", "sync", "rename"])
def test_a_full_disk_leaves_no_checkpoint(
    tmp_path: Path, method: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runs.recipe(tmp_path, method=method)
    whole = train(replace(recipe, output_dir=str(tmp_path / "whole")))
    run, write, rename, sync = tmp_path / "run", Path.write_text, Path.rename, run_state.flush

    def second(path: Path) -> bool:
        return "checkpoint-0000002" in str(path)

    def write_text(self: Path, text: str, *rest: Any, **named: Any) -> int:
        if self.name == file and second(self):
            write(self, text[: len(text) // 2])
            raise FULL_DISK
        return write(self, text, *rest, **named)

    saves = {"full": Training, "lora": Training}[method]
    save = saves.save

    def save_model(self: Training, folder: Path) -> None:
        if second(folder):
            (folder / "model.safetensors").write_bytes(b"half")
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        if file == "weights":
            patch.setattr(saves, "save", save_model)
        if file == "training_state.pt":
            full = torch.save
            patch.setattr(torch, "save", lambda state, path: (_half_written if second(path) else full)(state, path))
        if file == "sync":
            patch.setattr(run_state, "flush", lambda path: (_full if second(path) else sync)(path))
        if file == "rename":
            patch.setattr(Path, "rename", lambda self, to: (_full if second(self) else rename)(self, to))
        with pytest.raises(
            OSError, match=r"checkpoint-0000002 could not be written .*No space left.*; make room there"
        ):
            train(recipe)
    assert [path.name for path in run_state.whole_checkpoints(run)] == ["checkpoint-0000001"]
    assert [path.name for path in run.iterdir() if "0000002" in path.name] == []
    assert train(recipe) == whole
    assert_same(runs.weights(run), runs.weights(tmp_path / "whole"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_disk_that_is_really_full(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(tmp_path, method=method)
    whole = train(replace(recipe, output_dir=str(tmp_path / "whole")))
    last = sorted((tmp_path / "whole").glob("checkpoint-*"))[-1]
    save, rest = run_state.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)
    # Longer files can't be written: the state's, then the weights', too.
    for limit in sorted(
        {next(last.glob("*.safetensors")).stat().st_size - 1, (last / "training_state.pt").stat().st_size - 1}
    ):

        def limited(run: Path, progress: Progress, *more: Any, limit: int = limit) -> Path:
            if progress.step < 2:
                return save(run, progress, *more)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, rest[1]))
            try:
                return save(run, progress, *more)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, rest)

        run = tmp_path / f"limit-{limit}"
        with monkeypatch.context() as patch:
            patch.setattr(run_state, "save_checkpoint", limited)
            with pytest.raises(OSError, match="checkpoint-0000002 could not be written"):
                train(replace(recipe, output_dir=str(run)))
        assert [path.name for path in run.glob("*checkpoint-*")] == ["checkpoint-0000001"]
        assert train(replace(recipe, output_dir=str(run))) == whole
        assert_same(runs.weights(run), runs.weights(tmp_path / "whole"))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, max_steps=5, save_total_limit=5)
    train(recipe)
    expected = runs.weights(tmp_path / "run")
    for step, name in ((3, "training_state.pt"), (4, "model.safetensors"), (5, "complete.json")):
        path = run_state.folder_of(tmp_path / "run", step) / name
        path.write_bytes(path.read_bytes()[:-7])
    leftover = tmp_path / "run" / ".checkpoint-0000003.part"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    train(recipe)
    assert len(run_state.whole_checkpoints(tmp_path / "run")) == 5
    assert not leftover.exists()
    assert_same(runs.weights(tmp_path / "run"), expected)
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_loss_that_is_no_number_ends_the_run_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Florence2Learner.forward
    taken = 0

    def spoilt(self: Florence2Learner, batch: Any) -> Tensor:
        nonlocal taken
        taken += 1
        return forward(self, batch) * (math.nan if taken == 2 else 1)

    monkeypatch.setattr(Florence2Learner, "forward", spoilt)
    with pytest.raises(RuntimeError, match="the loss is no number any more; lower learning_rate"):
        train(runs.recipe(tmp_path))
    assert [path.name for path in run_state.whole_checkpoints(tmp_path / "run")] == ["checkpoint-0000001"]


def test_gradients_that_are_no_numbers_reach_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop._step
    taken = 0

    def spoilt(accelerator: Any, module: Any, optimizer: Any, batches: Any, parameters: Any, schedule: Any) -> Any:
        nonlocal taken
        taken += 1
        hook = parameters[0].register_hook(lambda grad: grad * math.inf) if taken == 2 else None
        try:
            return step(accelerator, module, optimizer, batches, parameters, schedule)
        finally:
            if hook:
                hook.remove()

    monkeypatch.setattr(loop, "_step", spoilt)
    with pytest.raises(RuntimeError, match="no number"):
        train(runs.recipe(tmp_path))
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(tmp_path / "run").values())


# --- validation ---


UNKNOWN = "<OD> unknown_labels"
"""A metric that is best where it is low."""


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], **given: Any) -> Progress:
    """A run whose validations give `values`."""
    left = iter(values)
    monkeypatch.setattr(Judge, "_answers", lambda self: {"<OD> AP50": next(left), UNKNOWN: next(left)})
    monkeypatch.setattr(Judge, "higher_is_better", lambda self, name: name == "<OD> AP50")
    data = runs.lines(folder / "validation.jsonl", runs.SAMPLES[:2])
    settings: dict[str, Any] = {"eval_steps": 1, "save_total_limit": 1, "max_steps": 5, **given}
    return train(runs.recipe(folder, validation=[Source(data=str(data))], **settings))


def kept(run: Path) -> list[int]:
    return [int(path.name[-7:]) for path in run_state.whole_checkpoints(run)]


def test_the_best_is_the_highest_or_the_lowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1, 0.9, 0.8, 0.3, 0.8, 0.2, 0.5, 0.5, 0.4, 0.7]
    high = judged(tmp_path / "high", monkeypatch, values, metric_for_best_model="<OD> AP50")
    assert (high.best, high.best_step, kept(tmp_path / "high" / "run")) == (0.8, 2, [2, 5])
    low = judged(tmp_path / "low", monkeypatch, values, metric_for_best_model=UNKNOWN)
    assert (low.best, low.best_step, kept(tmp_path / "low" / "run")) == (0.2, 3, [3, 5])
    assert low.scores[4][UNKNOWN] == 0.5
    assert low.scores[4].keys() == {"loss", "<OD> AP50", UNKNOWN}


def test_a_metric_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"metric_for_best_model 'mAP' is not among those .*: .*<OD> AP50, "):
        judged(tmp_path, monkeypatch, [], metric_for_best_model="mAP")
    # Before anything was trained: the recipe can be mended.
    assert judged(tmp_path, monkeypatch, [0.1] * 10, metric_for_best_model="<OD> AP50").best == 0.1


def test_a_metric_that_the_answers_leave_undefined_is_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([{}, {"<OD> precision@0.5": 0.5}, {}])
    monkeypatch.setattr(Judge, "_answers", lambda self: next(answers))
    data = runs.lines(tmp_path / "validation.jsonl", runs.SAMPLES[:2])
    given: dict[str, Any] = {"eval_steps": 1, "metric_for_best_model": "<OD> precision@0.5"}
    progress = train(runs.recipe(tmp_path, validation=[Source(data=str(data))], **given))
    assert (progress.best, progress.best_step, progress.validations_without_better) == (0.5, 2, 1)


def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [value for one in (0.1, 0.5, 0.5, 0.4, 0.9) for value in (one, 0.0)]
    given: dict[str, Any] = {"metric_for_best_model": "<OD> AP50", "early_stopping_patience": 2}
    progress = judged(tmp_path, monkeypatch, values, **given)
    assert progress.stopped_early
    assert (progress.step, progress.best, progress.best_step) == (4, 0.5, 2)
    assert kept(tmp_path / "run") == [2, 4]
    assert judged(tmp_path, monkeypatch, [], **given) == progress


def test_validation_measures_the_loss_and_the_answers(tmp_path: Path) -> None:
    data = runs.lines(tmp_path / "validation.jsonl", runs.SAMPLES)
    given: dict[str, Any] = {"validation": [Source(data=str(data))], "eval_samples": 5, "max_steps": 1}
    progress = train(runs.recipe(tmp_path, **given, metric_for_best_model="<OD> AP50"))
    assert "<OD> AP50" in progress.scores[1]
    learned = tmp_path / "run" / "checkpoint-0000001"
    from florence2_export.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(str(learned))
    batch = runs.batches(checkpoint, tmp_path / "data")[Batch(list(range(5)))]
    with torch.no_grad():
        expected = learner_of(checkpoint)(batch) / batch["weight"]
    assert progress.scores[1]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert [line for line in runs.log(tmp_path / "run") if "<OD> AP50" in line] == [{"step": 1, **progress.scores[1]}]


def test_validation_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Judge._loss
    # Whatever it draws.
    monkeypatch.setattr(Judge, "_loss", lambda self: (torch.rand(7), random.random(), loss(self))[-1])
    train(busy(tmp_path, "with"))
    given: dict[str, Any] = {"validation": [], "eval_steps": None}
    recipe = busy(tmp_path, "without")
    train(replace(recipe, **given))
    assert_same(runs.weights(tmp_path / "with"), runs.weights(tmp_path / "without"))


# --- the same in other ways ---


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, max_steps=5))
    split: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "two"), **split))
    assert_close(runs.weights(tmp_path / "one"), runs.weights(tmp_path / "two"))
    losses = [[line["loss"] for line in runs.log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Started at once, read at the end: its imports take longer than all else here."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = split_recipe(folder, "two", 2)
    save_recipe(recipe, folder / "recipe.yaml")
    # Of several processes on the CPU accelerate (1.15) launches one, or asks for MPI; as "GPUs" it launches them all.
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*launch, "--main_process_port", "0", "-m", "florence2_cli", "train", str(folder / "recipe.yaml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
    try:
        yield folder, process
    finally:
        # It ends its processes then; killed, it would leave them.
        process.terminate()
        process.wait(timeout=60)


def split_recipe(folder: Path, name: str, size: int) -> Recipe:
    # 7 samples in steps of 6: the second has one, and one process nothing to do.
    data = runs.lines(folder / "validation.jsonl", runs.SAMPLES[:3])
    given: dict[str, Any] = {"per_device_train_batch_size": 3 if size == 2 else 6, "max_steps": 6, "save_steps": 500}
    judges: dict[str, Any] = {"validation": [Source(data=str(data))], "eval_steps": 3, "freeze": ["vision"]}
    return runs.recipe(folder, output_dir=str(folder / name), **given, **judges)


@pytest.fixture(scope="module", autouse=True)
def _started(request: pytest.FixtureRequest) -> None:
    if any("two_processes" in item.name for item in request.session.items):
        request.getfixturevalue("two_processes")


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(tmp_path: Path) -> None:
    def measured(checkpointed: bool) -> tuple[dict[str, Tensor], int, set[str]]:
        checkpoint = runs.loaded(tmp_path / "model", dropout=0.1, drop_path=0.2)
        batch = runs.batches(checkpoint, tmp_path / "data")[EVERYTHING]
        if checkpointed:
            checkpoint_activations(checkpoint.model)
        trainable.set_modes(checkpoint.model)
        count = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return tensor

        tower: Any = checkpoint.model.model.vision_tower
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            tower(normalised(batch["pixels"], checkpoint.preprocessor))
            in_tower, count = count, 0
            torch.manual_seed(3)
            loss = learner_of(checkpoint)(batch)
        loss.backward()
        return gradients(checkpoint.model), in_tower, {str(count)}

    plain, plain_tower, plain_all = measured(False)
    less, less_tower, less_all = measured(True)
    assert_close(less, plain, atol=1e-6)
    assert less_tower < plain_tower / 2
    assert int(less_all.pop()) < int(plain_all.pop()) / 2


def test_gradient_checkpointing_with_adapters(tmp_path: Path) -> None:
    found = []
    for checkpointed in (False, True):
        checkpoint = runs.loaded(tmp_path / "model", trained=False)
        torch.manual_seed(0)
        add_adapters(checkpoint.model, Lora(targets="all", dropout=0.0), "base")
        if checkpointed:
            checkpoint_activations(checkpoint.model)
        for name, parameter in checkpoint.model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter)
        trainable.set_modes(checkpoint.model)
        batch = runs.batches(checkpoint, tmp_path / "data")[EVERYTHING]
        learner_of(checkpoint)(batch).backward()
        found.append(gradients(checkpoint.model))
    assert all(tensor.any() for name, tensor in found[0].items() if "window_attn" in name)
    assert_close(found[0], found[1], atol=1e-4)


def test_bf16_keeps_fp32_weights(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        given: dict[str, Any] = {"freeze": ["vision"], "cache_features": True, "max_steps": 5}
        train(runs.recipe(tmp_path, output_dir=str(tmp_path / "bf16"), mixed_precision="bf16", **given))
        lora: dict[str, Any] = {"method": "lora", "lora": Lora(targets="all"), "gradient_checkpointing": True}
        train(runs.recipe(tmp_path, output_dir=str(tmp_path / "lora"), mixed_precision="bf16", **lora))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "fp32"), **given))
    low = runs.weights(tmp_path / "bf16")
    assert {tensor.dtype for tensor in low.values()} == {torch.float32}
    assert {tensor.dtype for tensor in runs.weights(tmp_path / "lora").values()} == {torch.float32}
    losses = [[line["loss"] for line in runs.log(tmp_path / name)] for name in ("bf16", "fp32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    # Steps finer than bf16 has are kept.
    moved = low["model.language_model.shared.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())
    rows = [next((tmp_path / name / "run.json").parent.glob("features/*/*.bin")) for name in ("bf16", "fp32")]
    assert rows[0].stat().st_size * 2 == rows[1].stat().st_size


def test_tensorboard_is_written_when_asked(tmp_path: Path) -> None:
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "quiet")))
    assert list((tmp_path / "quiet").rglob("*tfevents*")) == []
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "shown"), tensorboard=True))
    (file,) = (tmp_path / "shown" / "tensorboard").iterdir()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(file))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in runs.log(tmp_path / "shown")]


def test_workers_change_nothing(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "lora", "cache_features": True, "max_steps": 3}
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "none"), **given))
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "one"), **given, dataloader_num_workers=1))
    assert_same(runs.weights(tmp_path / "none"), runs.weights(tmp_path / "one"))


def test_a_run_says_what_it_is_made_of(tmp_path: Path) -> None:
    train(runs.recipe(tmp_path, freeze=["vision"]))
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["data"]["train"]["samples"] == len(runs.SAMPLES)
    assert found["layout"] == "native"
    assert found["parameters"]["vision"]["trained"] == 0
    assert found["parameters"]["embeddings"] == {"trained": runs.ROWS * 16, "all": runs.ROWS * 16}
    assert found["packages"].keys() == {"florence2-triton", "torch", "transformers", "peft", "accelerate"}
    assert runs.log(tmp_path / "run")[0].keys() == {
        *("step", "loss", "learning_rate", "grad_norm", "seconds", "pictures_per_second", "memory_gb")
    }


# --- features ---


def filled(checkpoint: Any, folder: Path, pictures: list[str]) -> FeatureCache:
    tower = checkpoint.model.model.vision_tower
    cache = open_cache(folder, tower, checkpoint.preprocessor, torch.float32)
    compute = computer(
        tower, checkpoint.preprocessor, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False)
    )
    stamped, pixels = PictureGroups([cache.missing(pictures)], checkpoint.preprocessor)[0]
    cache.fill([(stamped, compute(pixels))])
    return cache


def test_cached_features_lose_what_pictures_lose(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model", drop_path=0.3)
    trainable.freeze(checkpoint.model, ["vision"])
    trainable.set_modes(checkpoint.model)
    plain = runs.batches(checkpoint, tmp_path / "data")
    pictures = plain.corpora[0].picture_files
    cache = filled(checkpoint, tmp_path / "features", pictures)
    assert cache.missing(pictures) == []
    learner = learner_of(checkpoint)
    batch = runs.batches(checkpoint, tmp_path / "data", features=cache)[EVERYTHING]
    assert batch["features"].shape == (4, 20, 2, 2)
    torch.testing.assert_close(learner(batch), learner(plain[EVERYTHING]), rtol=1e-6, atol=0)
    whole: dict[str, Any] = {"freeze": ["vision"], "max_steps": 4, "group_by_image": False}
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "cached"), cache_features=True, **whole))
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "read"), cache_features=False, **whole))
    assert_close(runs.weights(tmp_path / "cached"), runs.weights(tmp_path / "read"))
    assert list((tmp_path / "cached" / "features").iterdir())
    assert not (tmp_path / "read" / "features").exists()
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "moving"), cache_features=True, max_steps=1))
    assert not (tmp_path / "moving" / "features").exists()


def test_runs_with_the_same_tower_share_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"freeze": ["vision"], "features_dir": str(tmp_path / "shared"), "max_steps": 1}
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "one"), **given))
    monkeypatch.setattr(FeatureCache, "fill", lambda *arguments: pytest.fail("computed again"))
    train(runs.recipe(tmp_path, output_dir=str(tmp_path / "two"), **given))
    assert len(list((tmp_path / "shared").iterdir())) == 1


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_changed_picture_is_computed_anew(
    tmp_path: Path, order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the names of the files say of their order.
    names = iter(order)
    monkeypatch.setattr(features_module.uuid, "uuid4", lambda: SimpleNamespace(hex=next(names)))
    checkpoint = runs.loaded(tmp_path / "model")
    pictures = [str(path) for path in runs.pictures(tmp_path / "pictures", 3)]
    before = filled(checkpoint, tmp_path / "features", pictures).read(pictures)
    shutil.copyfile(pictures[0], pictures[1])
    cache = open_cache(
        tmp_path / "features", checkpoint.model.model.vision_tower, checkpoint.preprocessor, torch.float32
    )
    assert cache.missing(pictures) == [pictures[1]]
    cache = filled(checkpoint, tmp_path / "features", pictures)
    for found in (cache, pickled(cache), filled_again(checkpoint, tmp_path / "features")):
        assert found.missing(pictures) == []
        after = found.read(pictures)
        assert torch.equal(after[0], before[0])
        torch.testing.assert_close(after[1], before[0], atol=1e-6, rtol=1e-5)
        assert torch.equal(after[2], before[2])
        assert not torch.allclose(after[1], before[1])


def pickled(cache: FeatureCache) -> FeatureCache:
    """As a worker process gets it."""
    import pickle

    cache.read(list(cache._rows)[:1])
    return pickle.loads(pickle.dumps(cache))


def filled_again(checkpoint: Any, folder: Path) -> FeatureCache:
    return open_cache(folder, checkpoint.model.model.vision_tower, checkpoint.preprocessor, torch.float32)


def test_features_of_another_tower_or_another_way_to_read_are_not_read(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model")
    pictures = [str(path) for path in runs.pictures(tmp_path / "pictures", 2)]
    filled(checkpoint, tmp_path / "features", pictures)
    tower: Any = checkpoint.model.model.vision_tower
    opened: Callable[..., FeatureCache] = lambda preprocessor, dtype: open_cache(  # noqa: E731
        tmp_path / "features", tower, preprocessor, dtype
    )
    assert opened(checkpoint.preprocessor, torch.float32).missing(pictures) == []
    assert opened(checkpoint.preprocessor, torch.bfloat16).missing(pictures) == pictures
    assert opened({**checkpoint.preprocessor, "resample": 2}, torch.float32).missing(pictures) == pictures
    with torch.no_grad():
        tower.convs[0].conv.bias[0] += 1e-6
    assert opened(checkpoint.preprocessor, torch.float32).missing(pictures) == pictures


def test_a_torn_line_of_an_index_is_ignored(tmp_path: Path) -> None:
    checkpoint = runs.loaded(tmp_path / "model")
    pictures = [str(path) for path in runs.pictures(tmp_path / "pictures", 3)]
    whole = filled(checkpoint, tmp_path / "features", pictures)
    expected = whole.read(pictures)
    (index,) = whole.folder.glob("*.jsonl")
    text = index.read_text()
    for cut in (1, 2, 20):
        index.write_text(text[:-cut])
        assert filled_again(checkpoint, tmp_path / "features").missing(pictures) == [pictures[2]]
    # A row that the kill cut short belongs to no line.
    (rows,) = whole.folder.glob("*.bin")
    rows.write_bytes(rows.read_bytes()[:-5])
    assert torch.equal(filled_again(checkpoint, tmp_path / "features").read(pictures[:2]), expected[:2])
    found = filled(checkpoint, tmp_path / "features", pictures).read(pictures)
    assert torch.equal(found[:2], expected[:2])
    torch.testing.assert_close(found[2], expected[2], atol=1e-6, rtol=1e-5)


def test_bf16_features_are_kept_bit_by_bit(tmp_path: Path) -> None:
    picture = str(runs.pictures(tmp_path / "pictures", 1)[0])
    values = torch.randn(1, 3, 2, 2).bfloat16()
    cache = FeatureCache(tmp_path / "features", (3, 2, 2), torch.bfloat16)
    stamped, _ = PictureGroups([[picture]], runs.loaded(tmp_path / "model").preprocessor)[0]
    cache.fill([(stamped, values.float())])
    assert torch.equal(cache.read([picture, picture]), values.expand(2, -1, -1, -1))


def test_no_room_for_features_is_said_before_they_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four pictures of 20 x 2 x 2 floats take 1280 bytes.
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1300))
    monkeypatch.setattr(FeatureCache, "fill", lambda *arguments: pytest.fail("computed"))
    given: dict[str, Any] = {"freeze": ["vision"]}
    with pytest.raises(ValueError, match=r"the features of 4 pictures take 0.0 GB.* or cache_features=false"):
        train(runs.recipe(tmp_path, **given))
    monkeypatch.undo()
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1400))
    train(runs.recipe(tmp_path, **given))


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, method="lora")
    path = runs.pictures(tmp_path / "pictures")[2]
    path.write_bytes(path.read_bytes()[:40])
    for cached in (True, False):
        given = replace(recipe, cache_features=cached, output_dir=str(tmp_path / str(cached)), max_steps=4)
        with pytest.raises(ValueError, match=r"2\.png: .*; `florence2 data check` finds all such pictures"):
            train(given)


# --- several processes: last, as they were started first ---


def test_two_processes_are_one_with_twice_the_batch(two_processes: tuple[Path, subprocess.Popen[bytes]]) -> None:
    folder, process = two_processes
    assert process.wait(timeout=120) == 0, (folder / "output.txt").read_text()
    one = train(split_recipe(folder, "one", 1))
    assert_close(runs.weights(folder / "two"), runs.weights(folder / "one"))
    logs = [[line.get("loss") for line in runs.log(folder / name)] for name in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    last = sorted((folder / "two").glob("checkpoint-*"))[-1]
    assert len(run_state.load_states(last)[1]) == 2
    assert run_state.load_progress(last).scores[6]["loss"] == pytest.approx(one.scores[6]["loss"], rel=1e-5)
    assert (folder / "two" / "data" / "1" / "train.jsonl").exists()
    with pytest.raises(ValueError, match="is of a run on 2 processes; go on with as many, or start in another folder"):
        train(split_recipe(folder, "two", 2))
