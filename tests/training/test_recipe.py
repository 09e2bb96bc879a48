"""The recipe: what a file and a command line may say, what is refused and in what words."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import runs
from florence2_cli import main
from florence2_cli import train as cli_train
from florence2_training.recipe import (
    LONG_ANSWERS,
    METHODS,
    PARTS,
    PRECISIONS,
    Lora,
    Recipe,
    Source,
    load_recipe,
    save_recipe,
    saved_recipe,
    settings,
)
from florence2_training.trainable import PRESETS

from florence2.files import write_whole


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


SMALLEST = "model: base\noutput_dir: run\ntrain: [{data: lines.jsonl}]\n"


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert load_recipe(recipe_file(tmp_path, SMALLEST)) == Recipe(
        model="base", output_dir="run", train=[Source(data="lines.jsonl")]
    )


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, SMALLEST + "learning_rate: 1e-3\nlora: {r: 2, use_dora: true}\n")
    recipe = load_recipe(
        path,
        [
            *("lora.r=4", "learning_rate=5e-5", "lora.targets=['.*fc1','.*fc2']", "max_steps=7", "tensorboard=true"),
            *("learning_rates={vision: 1e-6}", "task_weights={<OD>: 2}", "eval_steps=null", "lora.alpha=8"),
            "train=[{data: other.jsonl, split: valid}]",
        ],
    )
    assert recipe == Recipe(
        model="base",
        output_dir="run",
        train=[Source(data="other.jsonl", split="valid")],
        learning_rate=5e-5,
        lora=Lora(r=4, alpha=8, use_dora=True, targets=[".*fc1", ".*fc2"]),
        max_steps=7,
        tensorboard=True,
        learning_rates={"vision": 1e-6},
        task_weights={"<OD>": 2.0},
    )
    assert isinstance(recipe.lora, Lora)
    assert isinstance(recipe.train[0], Source)
    assert load_recipe(path, ["method=full", "lora={r: 16, use_dora: false}", "freeze=[vision,projector]"]).freeze == [
        "vision",
        "projector",
    ]


def test_a_recipe_may_be_given_on_the_command_line_alone() -> None:
    recipe = load_recipe(None, ["model=a", "output_dir=b", "train=[{data: c}]"])
    assert recipe == Recipe(model="a", output_dir="b", train=[Source(data="c")])


def test_paths_in_the_file_start_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here/data/a.jsonl", "here/pictures/x", "here/base/x", "there/data/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "there")
    text = (
        "model: base\noutput_dir: run\ntrain: [{data: data/a.jsonl, images: pictures}]\nvalidation: [{data: gone}]\n"
        f"replay: [{{data: {tmp_path}/there/data/a.jsonl}}]\n"
    )
    found = load_recipe(recipe_file(tmp_path / "here", text))
    here = tmp_path / "here"
    assert found.train == [Source(data=str(here / "data" / "a.jsonl"), images=str(here / "pictures"))]
    assert found.model == str(here / "base")
    assert found.validation == [Source(data="gone")]
    assert found.replay == [Source(data=f"{tmp_path}/there/data/a.jsonl")]
    assert found.output_dir == "run"
    given = load_recipe(here / "recipe.yaml", ["model=microsoft/Florence-2-base", "train=[{data: data/a.jsonl}]"])
    assert given.model == "microsoft/Florence-2-base"
    assert given.train == [Source(data="data/a.jsonl")]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("learning_rat: 1", [], "learning_rat"),
        ("lora: {rank: 4}", [], r"lora\.rank"),
        ("train: [{datas: x}]", [], "datas"),
        ("max_steps: many", [], "max_steps"),
        ("lora: {r: a}", [], r"lora\.r"),
        ("freeze: vision", [], "freeze"),
        ("tensorboard: perhaps", [], "tensorboard"),
        ("", ["lora.rank=3"], "rank"),
        ("", ["seeed=3"], "seeed"),
        ("", ["max_steps=1.5"], "max_steps"),
        ("model: [", [], "recipe.yaml"),
        ("- a\n- b", [], "recipe.yaml"),
    ],
)
def test_what_is_no_setting_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("`florence2 train --help` lists the settings")


def test_a_recipe_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.yaml is missing; give a YAML file of settings"):
        load_recipe(tmp_path / "gone.yaml")


WHOLE: dict[str, Any] = {"model": "m", "output_dir": "o", "train": [Source(data="d")]}
FULL = WHOLE | {"method": "full"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (WHOLE | {"model": ""}, "the recipe has no model; set it: the checkpoint to start from"),
        (WHOLE | {"output_dir": ""}, "the recipe has no output_dir; set it: the run's folder"),
        (WHOLE | {"train": []}, "the recipe has no train; set it: what is learned"),
        (WHOLE | {"train": [Source()]}, "a source of train has no data"),
        (WHOLE | {"validation": [Source()]}, "a source of validation has no data"),
        (WHOLE | {"replay": [Source()]}, "a source of replay has no data"),
        (WHOLE | {"method": "qlora"}, "method is one of lora, full, not 'qlora'"),
        (WHOLE | {"long_answers": "cut"}, "long_answers is one of refuse, truncate, skip, not 'cut'"),
        (WHOLE | {"mixed_precision": "fp16"}, "mixed_precision is one of auto, no, bf16, not 'fp16'"),
        (FULL | {"freeze": ["tower"]}, "a part is one of vision, projector, .*, not 'tower'"),
        (WHOLE | {"learning_rates": {"head": 1}}, "a part is one of .*, not 'head'"),
        (WHOLE | {"freeze": ["vision"]}, "freeze is for method full; with lora, lora.targets"),
        (FULL | {"lora": Lora(r=4)}, "lora.* says nothing with method full"),
        (WHOLE | {"replay_share": 1.0}, "replay_share is a part of an epoch, from 0 to below 1, not 1.0"),
        (WHOLE | {"replay_share": -0.1}, "replay_share"),
        (WHOLE | {"lora": Lora(r=0)}, "lora.r is a whole number from 1 on, not 0"),
        *(
            (WHOLE | {name: 0}, f"{name} is a whole number from 1 on, not 0")
            for name in (
                *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"),
                *("save_total_limit", "max_steps", "eval_steps", "eval_samples", "early_stopping_patience"),
            )
        ),
        *(
            (WHOLE | {name: 0.0}, f"{name} is more than 0, not 0.0")
            for name in ("num_train_epochs", "learning_rate", "max_grad_norm")
        ),
        (WHOLE | {"learning_rate": float("nan")}, "learning_rate is more than 0"),
        (WHOLE | {"warmup_ratio": 5.0}, "warmup_ratio is a part, from 0 to below 1, not 5.0"),
        (WHOLE | {"lora": Lora(dropout=-0.1)}, "lora.dropout is a part, from 0 to below 1, not -0.1"),
        (WHOLE | {"weight_decay": -0.1}, "weight_decay is from 0 on, not -0.1"),
        (WHOLE | {"dataloader_num_workers": -1}, "dataloader_num_workers is from 0 on, not -1"),
        (WHOLE | {"task_weights": {"<OD>": -1.0}}, "task_weights: <OD> is from 0 on, not -1.0"),
        (WHOLE | {"task_weights": {"<OD>": float("nan")}}, "task_weights: <OD>"),
        (WHOLE | {"metric_for_best_model": "<OD> AP50"}, "judges by validation, but has no validation data"),
        (WHOLE | {"early_stopping_patience": 1}, "judges by validation"),
        (WHOLE | {"eval_steps": 1}, "judges by validation"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**given).check()


def test_what_can_be_meant_is_not_refused() -> None:
    Recipe(**WHOLE).check()
    for name, allowed in (("method", METHODS), ("long_answers", LONG_ANSWERS), ("mixed_precision", PRECISIONS)):
        for value in allowed:
            Recipe(**WHOLE | {name: value}).check()
    Recipe(**FULL, freeze=list(PARTS[1:]), learning_rates={"vision": 1e-6}).check()
    Recipe(**WHOLE, validation=[Source(data="v")], eval_steps=2, metric_for_best_model="x").check()


def test_a_saved_recipe_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(
        **WHOLE,
        lora=Lora(targets=["a.*", "b"], alpha=3.5),
        task_weights={"<OD>": 0.5},
        lr_scheduler_kwargs={"num_cycles": 2, "min_lr_rate": 0.1},
        eval_steps=None,
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert saved_recipe(tmp_path / "recipe.yaml") == recipe
    # Its paths are those it was given, whatever lies beside the file.
    (tmp_path / "d").mkdir()
    (tmp_path / "m").mkdir()
    assert saved_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_file_that_is_replaced_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "one")

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "two")
    assert path.read_text() == "one"


def test_settings_list_every_field() -> None:
    names = [name for name, _, _ in settings()]
    own = [field.name for field in dataclasses.fields(Recipe)]
    nested = [f"lora.{field.name}" for field in dataclasses.fields(Lora)]
    sources = [f"train[].{field.name}" for field in dataclasses.fields(Source)]
    at, after = own.index("lora"), own.index("train") + 1
    assert names == own[:after] + sources + own[after:at] + nested + own[at + 1 :]
    shown = {name: (default, text) for name, default, text in settings()}
    assert shown["lora.r"] == ("16", "rank")
    assert shown["learning_rate"][0] == "0.0001"
    assert all(text for _, text in shown.values())
    for preset in PRESETS:
        assert preset in shown["lora.targets"][1]


def test_help_shows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name, default, text in settings():
        assert f"  {name} [{default}]\n      {text}\n" in shown + "\n"


def test_a_dry_run_says_what_would_be_learned_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = runs.recipe(tmp_path, method="lora", per_device_train_batch_size=7)
    path = tmp_path / "recipe.yaml"
    save_recipe(recipe, path)
    before = sorted(tmp_path.rglob("*"))
    # Settings may stand on either side of it.
    assert main(["train", str(path), "--dry-run", "seed=1"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "7 samples an epoch in 1 steps of up to 7"
    assert "the first batch: 7 samples, 4 pictures" in shown
    place = shown.index("  reads   <s>Locate the objects with category name in the image.</s>")
    reads = [line for line in shown if line.startswith("  reads ")]
    assert sorted(reads) == sorted(
        [
            *["  reads   <s>Locate the objects with category name in the image.</s>"] * 2,
            *["  reads   <s>What does the image describe?</s>"] * 3,
            "  reads   <s>What is the text in the image?</s>",
            "  reads   <s>what?</s>",
        ]
    )
    learned = [line.removeprefix("  learns  ") for line in shown if line.startswith("  learns  ")]
    assert sorted(learned) == sorted(f"<s>{answer}</s>" for _, _, answer in runs.SAMPLES)
    # "them": <s>, the, m, </s>; the longest of the batch is "the age of the cat, in full".
    checkpoint = runs.loaded(tmp_path / "again")
    longest = max(len(checkpoint.tokenizer.encode(answer).ids) for _, _, answer in runs.SAMPLES)
    there = shown.index("  learns  <s>them</s>")
    assert shown[there + 1] == f"          4 tokens count; {longest - 4} of {longest} labels are padding and ignored"
    assert place < shown.index("parameters trained")
    # q, k, v, out of three attentions of width 16; fc1 and fc2, 16 to 24, of two layers: rank 16.
    trained = 16 * (3 * 4 * (16 + 16) + 2 * 2 * (16 + 24))
    total = sum(parameter.numel() for parameter in checkpoint.model.parameters()) + trained
    table = shown[shown.index("parameters trained") + 1 : shown.index("memory, estimated")]
    rows = {line.split()[0]: line.split()[1:] for line in table if line}
    assert rows["vision"][0] == rows["projector"][0] == rows["embeddings"][0] == "0"
    assert rows["embeddings"][2] == f"{runs.ROWS * 16:,}"
    assert rows["all"][:3] == [f"{trained:,}", "of", f"{total:,}"]
    for what in ("weights", "gradients and optimizer", "activations of the longest batch"):
        assert any(line.startswith(f"  {what} ") and line.endswith(" GB") for line in shown)


def test_errors_of_a_recipe_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_file(tmp_path, SMALLEST)
    assert main(["train", str(path), "lora.r=0"]) == 1
    assert capsys.readouterr().err == "florence2: lora.r is a whole number from 1 on, not 0\n"
    assert cli_train.EXTRA == "train"
