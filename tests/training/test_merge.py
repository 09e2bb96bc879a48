"""Adapters put in, saved and merged: what comes out answers as what went in, and loads where users load it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints as make
import pytest
import runs
import torch
from florence2_cli import main
from florence2_export.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from florence2_training import run_state
from florence2_training.adapters import CONFIG, WEIGHTS, add_adapters, base_of, load_adapter
from florence2_training.merge import Merged, merge
from florence2_training.recipe import Lora, Source
from florence2_training.saving import make_native, save_microsoft, save_native
from florence2_training.train import train
from florence2_training.trainable import PRESETS, targets
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, Florence2ForConditionalGeneration

KINDS = {"lora": Lora(), "dora": Lora(use_dora=True), "rslora": Lora(use_rslora=True)}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.native(tmp_path_factory.mktemp("native") / "base")


@pytest.fixture(scope="module")
def microsoft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a row for <image>."""
    return make.write_microsoft(tmp_path_factory.mktemp("microsoft") / "base", runs.model(rows=make.ROWS))


def shake(model: nn.Module, part: str = "lora_", scale: float = 0.1) -> None:
    """Fresh adapters add nothing."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter) * scale)


def adapter(base: Path, folder: Path, lora: Lora) -> Any:
    """Saved in `folder`; the unmerged model, which is what merging must equal."""
    checkpoint = load_checkpoint(str(base))
    make_native(checkpoint)
    adapted = add_adapters(checkpoint.model, lora, str(base))
    shake(adapted)
    adapted.save_pretrained(folder)
    return checkpoint.model.eval()


def linears(base: Path) -> dict[str, nn.Module]:
    model = load_checkpoint(str(base)).model
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def assert_logits(model: Any, expected: Tensor, atol: float = 2e-5) -> None:
    found = make.logits(model)
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=atol, rtol=1e-4)


# --- targets ---


def test_presets_cover_what_they_say(native: Path) -> None:
    model, every = load_checkpoint(str(native)).model, linears(native)
    text = {name for name in every if name.startswith("model.language_model.")}
    projector = {name for name in every if name.startswith("model.multi_modal_projector.")}
    vision = {name for name in every if name.startswith("model.vision_tower.")}
    assert (len(text), len(projector), len(vision)) == (6 + 10, 1, 4 * 2 * 4)
    assert text | projector | vision | {"lm_head"} == every.keys()
    assert set(targets(model, "text")) == text
    assert set(targets(model, "text+projector")) == text | projector
    assert set(targets(model, "all")) == text | projector | vision


def test_patterns_are_for_whole_names_of_linear_layers(native: Path) -> None:
    model = load_checkpoint(str(native)).model
    assert targets(model, [r".*\.decoder\..*\.fc1"]) == ["model.language_model.decoder.layers.0.fc1"]
    assert "lm_head" not in targets(model, [".*"])
    assert len(targets(model, [".*", r".*fc1"])) == len(linears(native)) - 1
    for pattern in ("fc1", "lm_head", r".*conv1", r".*\.convs\..*", r".*embed_positions"):
        with pytest.raises(ValueError, match=r"matches no linear layer as a whole; their names are like model\."):
            targets(model, [r".*fc2", pattern])
    with pytest.raises(ValueError, match=r"lora.targets: '\*fc1' is not a regular expression"):
        targets(model, ["*fc1"])
    with pytest.raises(ValueError, match=r"lora.targets is one of text, text\+projector, all, or a list of patterns"):
        targets(model, "vision")
    with pytest.raises(ValueError, match="empty"):
        targets(model, [])


@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_go_to_the_targets_and_nowhere_else(native: Path, preset: str) -> None:
    model: Any = load_checkpoint(str(native)).model
    wanted = targets(model, preset)
    add_adapters(model, Lora(targets=preset), str(native))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == set(wanted)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_merged_and_equal(tmp_path: Path, kind: str) -> None:
    lora = replace(KINDS[kind], r=4, targets="all", dropout=0.0)
    recipe = runs.recipe(tmp_path, method="lora", lora=lora, learning_rate=2e-2, max_steps=4, save_steps=4)
    train(recipe)
    saved = runs.weights(tmp_path / "run")
    kinds = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if kind == "dora" else set())
    assert {name.rpartition(".lora_")[2].split(".")[0] for name in saved} == {one[5:] for one in kinds}
    assert all(tensor.any() for tensor in saved.values())
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    # peft's own way to load what was saved.
    peft: Any = PeftModel.from_pretrained(checkpoint.model, str(tmp_path / "run" / "checkpoint-0000004"))
    expected = make.logits(peft.eval().base_model.model)
    base = make.logits(load_checkpoint(str(tmp_path / "model")).model)
    assert not torch.allclose(base, expected, atol=1e-3)

    found = merge(tmp_path / "run", tmp_path / "merged")
    assert found.source == tmp_path / "run" / "checkpoint-0000004"
    assert found.samples == 4
    assert found.largest_difference < 1e-4
    merged = load_checkpoint(str(tmp_path / "merged"))
    assert_logits(merged.model, expected)
    assert merged.repairs == []
    picture = runs.pictures(tmp_path / "pictures")[0]
    unmerged = runs.greedy(peft.base_model.model, checkpoint, picture, "<OD>")
    assert runs.greedy(merged.model, merged, picture, "<OD>") == unmerged


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(native: Path, tmp_path: Path, preset: str, kind: str) -> None:
    unmerged = adapter(native, tmp_path / "adapter", replace(KINDS[kind], targets=preset, r=4))
    expected = make.logits(unmerged)
    found = merge(tmp_path / "adapter", tmp_path / "merged")
    assert (found.source, found.samples) == (tmp_path / "adapter", 2)
    merged = load_checkpoint(str(tmp_path / "merged"))
    assert_logits(merged.model, expected, atol=1e-4)
    assert merged.model.config.tie_word_embeddings


# --- what can be merged ---


def test_a_run_gives_its_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = runs.lines(tmp_path / "validation.jsonl", runs.SAMPLES[:2])
    recipe = runs.recipe(tmp_path, method="lora", validation=[Source(data=str(data))], eval_steps=1, learning_rate=2e-2)
    losses = iter([3.0, 1.0, 2.0])
    from florence2_training.validation import Judge

    monkeypatch.setattr(Judge, "_loss", lambda self: next(losses))
    assert train(recipe).best_step == 2
    run = tmp_path / "run"
    assert merge(run, tmp_path / "best").source == run / "checkpoint-0000002"
    assert merge(run / "checkpoint-0000003", tmp_path / "last").source == run / "checkpoint-0000003"
    best, last = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "last"))
    name = "model.language_model.decoder.layers.0.fc1.weight"
    assert not torch.equal(best[name], last[name])
    damaged = run / "checkpoint-0000003" / WEIGHTS
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="checkpoint-0000003 is damaged; give another checkpoint of its run"):
        merge(run / "checkpoint-0000003", tmp_path / "none")
    damaged.write_bytes(content)
    best_weights = run / "checkpoint-0000002" / WEIGHTS
    best_weights.write_bytes(best_weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="checkpoint-0000002, the best, is missing or damaged; to merge another, give"):
        merge(run, tmp_path / "none")
    for folder in run_state.whole_checkpoints(run):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="has no whole checkpoint yet; `florence2 train` goes on where it stopped"):
        merge(run, tmp_path / "none")
    with pytest.raises(ValueError, match="nowhere is no folder; give a run's output_dir, an adapter, or a checkpoint"):
        merge(tmp_path / "nowhere", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_full_fine_tune_becomes_a_checkpoint(tmp_path: Path) -> None:
    train(runs.recipe(tmp_path, learning_rate=1e-2))
    last = tmp_path / "run" / "checkpoint-0000003"
    assert merge(tmp_path / "run", tmp_path / "out") == Merged(last, 0, 0.0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    saved, out = load_file(last / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == out.keys()
    assert all(torch.equal(saved[name], out[name]) for name in saved)
    with pytest.raises(ValueError, match="is a whole model, which needs no --base; leave it out"):
        merge(tmp_path / "run", tmp_path / "other", base=str(tmp_path / "model"))


def test_a_run_on_microsofts_layout(microsoft: Path, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, model=str(microsoft), method="lora", learning_rate=2e-2, lora=Lora(targets="all"))
    recipe.max_steps = 2
    train(recipe)
    merge(tmp_path / "run", tmp_path / "native")
    merge(tmp_path / "run", tmp_path / "microsoft", layout="microsoft")
    one, other = (load_checkpoint(str(tmp_path / name)) for name in ("native", "microsoft"))
    assert (one.layout, other.layout) == ("native", "microsoft")
    expected = make.logits(other.model)
    assert expected.shape[-1] == make.ROWS
    assert_logits(one.model, expected, atol=0)


# --- adapters of other trainers ---


def as_microsoft(folder: Path, native: Path, edit: Callable[[dict[str, Any]], object] = lambda config: None) -> Path:
    """The adapter as peft saves it on Microsoft's remote code."""
    names = {make.from_microsoft(name): name for name in make.microsoft_names([1, 1, 1, 1], (1, 1))}
    modules = {own.removesuffix(".weight"): name.removesuffix(".weight") for own, name in names.items()}
    state = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module, dot, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if not dot:
            # peft saves an embedding's, or a head's, own weights, too.
            module, dot, rest = module.removesuffix(".weight").removesuffix(".base_layer"), ".", "weight"
        state[f"base_model.model.{modules[module]}{dot}{rest}"] = tensor
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    def change(config: dict[str, Any]) -> None:
        config["target_modules"] = "^(language_model|vision_tower).*(qkv|proj|fc1|fc2|q_proj|v_proj)$"
        config["auto_mapping"] = {"base_model_class": "Florence2ForConditionalGeneration"}
        edit(config)

    make.edit_json(folder / CONFIG, change)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_microsofts_names(microsoft: Path, native: Path, tmp_path: Path, kind: str) -> None:
    text_and_vision = [PRESETS["text"][0], PRESETS["text"][1], r"model\.vision_tower\..*\.(qkv|proj|fc1|fc2)"]
    lora = replace(KINDS[kind], targets=text_and_vision, r=4)
    expected = make.logits(adapter(native, tmp_path / "adapter", lora))
    as_microsoft(tmp_path / "adapter", native)
    names = list(load_file(tmp_path / "adapter" / WEIGHTS))
    assert any(name.startswith("base_model.model.language_model.model.encoder.layers.0.") for name in names)
    assert any(".window_attn.fn.qkv.lora_A" in name for name in names)
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(native))
    assert_logits(load_checkpoint(str(tmp_path / "merged")).model, expected, atol=1e-4)


def test_ranks_and_alphas_of_microsofts_names(native: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(native))
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets(checkpoint.model, "all"),
        rank_pattern={r".*\.window_attn\.qkv": 2, r"decoder\.layers\.0\.fc1": 6},
        alpha_pattern={r".*\.window_attn\.qkv": 32, "self_attn.q_proj": 1},
    )
    adapted = get_peft_model(checkpoint.model, config)
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = make.logits(checkpoint.model.eval())

    def rename(config: dict[str, Any]) -> None:
        config["rank_pattern"] = {r".*\.window_attn\.fn\.qkv": 2, r"decoder\.layers\.0\.fc1": 6}
        config["alpha_pattern"] = {r".*\.window_attn\.fn\.qkv": 32, "self_attn.q_proj": 1}

    merge(tmp_path / "adapter", tmp_path / "own", base=str(native))
    assert_logits(load_checkpoint(str(tmp_path / "own")).model, expected, atol=1e-4)
    # The projector is no layer there, but a parameter.
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    state = {name: value for name, value in state.items() if "image_proj" not in name}
    save_file(state, tmp_path / "adapter" / WEIGHTS)
    merge(tmp_path / "adapter", tmp_path / "without", base=str(native))
    expected = make.logits(load_checkpoint(str(tmp_path / "without")).model)
    as_microsoft(tmp_path / "adapter", native, rename)
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(native))
    assert_logits(load_checkpoint(str(tmp_path / "merged")).model, expected, atol=0)


@pytest.mark.parametrize("names", ["native", "microsoft"])
def test_modules_that_were_trained_whole_replace_the_bases(native: Path, tmp_path: Path, names: str) -> None:
    checkpoint = load_checkpoint(str(native))
    text, norms = targets(checkpoint.model, "text"), ["image_proj_norm", "layernorm_embedding"]
    config = LoraConfig(r=4, target_modules=text, modules_to_save=norms)
    adapted = get_peft_model(checkpoint.model, config)
    shake(adapted, "modules_to_save")
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = make.logits(checkpoint.model.eval())
    if names == "microsoft":
        state = {}
        for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items():
            name = name.replace("model.multi_modal_projector.image_proj_norm", "image_proj_norm")
            name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
            state[name] = tensor
        save_file(state, tmp_path / "adapter" / WEIGHTS)
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(native))
    assert_logits(load_checkpoint(str(tmp_path / "merged")).model, expected, atol=1e-4)


def head_adapter(native: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """On the head alone -> the head's weight, the embeddings'."""
    checkpoint = load_checkpoint(str(native))
    embedding = checkpoint.model.model.language_model.shared.weight.detach().clone()
    adapted = get_peft_model(checkpoint.model, LoraConfig(r=4, target_modules=["lm_head"]))
    shake(adapted)
    adapted.save_pretrained(folder)
    head: Any = checkpoint.model.lm_head
    return (head.weight + head.get_delta_weight("default")).detach(), embedding


@pytest.mark.parametrize("layout", ["native", "microsoft"])
def test_an_adapter_on_the_head_leaves_the_embeddings(native: Path, tmp_path: Path, layout: str) -> None:
    head, embedding = head_adapter(native, tmp_path / "adapter")
    if layout == "microsoft":
        as_microsoft(tmp_path / "adapter", native)
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(native), layout=layout)
    merged = load_checkpoint(str(tmp_path / "merged"))
    rows = merged.model.config.text_config.vocab_size
    assert rows == (runs.ROWS if layout == "native" else make.ROWS)
    torch.testing.assert_close(merged.model.lm_head.weight, head[:rows])
    assert torch.equal(merged.model.model.language_model.shared.weight, embedding[:rows])
    assert not merged.model.config.tie_word_embeddings
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    if layout == "native":
        loaded: Any = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(loaded.lm_head.weight, head)
        for table in (loaded.get_input_embeddings(), *(loaded.model.language_model.encoder.embed_tokens,)):
            assert torch.equal(table.weight, embedding)


def test_a_tied_table_that_was_trained_in_two_copies_is_refused(native: Path, tmp_path: Path) -> None:
    adapter(native, tmp_path / "adapter", Lora(r=4))
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    table = load_checkpoint(str(native)).model.model.language_model.shared.weight.detach()
    prefix = "base_model.model.model.language_model."
    state[f"{prefix}encoder.embed_tokens.weight"] = table + 1
    save_file(state | {f"{prefix}decoder.embed_tokens.weight": table + 1}, tmp_path / "adapter" / WEIGHTS)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load_checkpoint(str(tmp_path / "merged")).model
    assert torch.equal(merged.model.language_model.shared.weight, table + 1)
    save_file(state | {f"{prefix}decoder.embed_tokens.weight": table + 2}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight .* tied"):
        merge(tmp_path / "adapter", tmp_path / "none")


# --- what is refused ---


def test_an_adapter_on_a_depthwise_convolution_is_refused(native: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(native))
    config = LoraConfig(r=8, target_modules=["blocks.0.0.spatial_block.conv1"])
    adapted = get_peft_model(checkpoint.model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.0\.spatial_block\.conv1 is a depthwise convolution"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(native))
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_an_adapter_on_a_plain_convolution_is_merged(native: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(native))
    adapted = get_peft_model(checkpoint.model, LoraConfig(r=4, target_modules=["convs.0.conv", "convs.2.conv"]))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = make.logits(checkpoint.model.eval())
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(native))
    assert_logits(load_checkpoint(str(tmp_path / "merged")).model, expected, atol=1e-4)


def test_another_base_is_refused_by_name(native: Path, tmp_path: Path) -> None:
    adapter(native, tmp_path / "adapter", Lora(r=4))
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    further = {name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in state.items()}
    save_file(state | further, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layers\.1\..* belongs to no layer of this model; give the base that"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    wide = {name: tensor.repeat(1, 2) if ".lora_A." in name else tensor for name, tensor in state.items()}
    save_file(wide, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"adapter: .*(size mismatch|Error)"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    name = "base_model.model.model.language_model.encoder.layernorm_embedding.weight"
    save_file(state | {name: torch.ones(17)}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layernorm_embedding\.weight is \[17\] where the base has \[16\]; give"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    del state[next(iter(state))]
    save_file(state, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"does not fit adapter_config\.json; save the adapter again"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_a_base_that_changed_since_the_run_is_refused(tmp_path: Path) -> None:
    train(runs.recipe(tmp_path, method="lora", max_steps=1))
    base = str(tmp_path / "model")
    assert base_of(tmp_path / "run" / "checkpoint-0000001") == (base, None)
    runs.native(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="is not what the run was trained from any more; bring that back, or give"):
        merge(tmp_path / "run", tmp_path / "merged")
    assert merge(tmp_path / "run", tmp_path / "merged", base=base).samples == 4


def test_an_adapter_names_the_revision_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = add_adapters(runs.loaded(tmp_path / "model").model, Lora(), "somebody/florence", "abc")
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert base_of(tmp_path / "adapter") == ("somebody/florence", "abc")
    asked: list[tuple[str, str | None]] = []

    def load(name: str, revision: str | None = None) -> Any:
        asked.append((name, revision))
        raise CheckpointError("asked")

    monkeypatch.setattr("florence2_training.merge.load_checkpoint", load)
    with pytest.raises(CheckpointError, match="asked"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert asked == [("somebody/florence", "abc")]


def test_settings_of_generation_are_saved_as_they_were_read(native: Path, tmp_path: Path) -> None:
    # transformers reads beams' settings with one beam, but refuses to save them.
    folder = make.copy_of(native, tmp_path / "greedy")
    make.edit_json(folder / "generation_config.json", lambda config: config.update(num_beams=1, early_stopping=True))
    merge(folder, tmp_path / "merged")
    read = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (read["num_beams"], read["early_stopping"]) == (1, True)
    assert load_checkpoint(str(tmp_path / "merged")).generation == load_checkpoint(str(folder)).generation


def test_what_is_no_lora_is_refused(native: Path, tmp_path: Path) -> None:
    adapter(native, tmp_path / "adapter", Lora(r=4))
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type IA3; only LoRA"),
        ({"bias": "all"}, "bias 'all' is trained, too"),
        ({"base_model_name_or_path": None}, "names no base model; give it with --base"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base, too"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed the base, too"),
    ):
        folder = make.copy_of(tmp_path / "adapter", tmp_path / "-".join(map(str, *change.items())))
        make.edit_json(folder / CONFIG, lambda config, change=change: config.update(change))
        with pytest.raises(ValueError, match=message):
            merge(folder, tmp_path / "merged")
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no adapter that can be read"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no adapter that can be read"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["native", "microsoft"])
def test_values_that_are_no_numbers_are_refused(native: Path, tmp_path: Path, value: float, layout: str) -> None:
    adapter(native, tmp_path / "adapter", Lora(r=4))
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    name = next(name for name in state if ".lora_B." in name)
    state[name][0, 0] = value
    save_file(state, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ValueError, match=r"NaN|no numbers"):
        merge(tmp_path / "adapter", tmp_path / "merged", layout=layout)
    whole = make.copy_of(native, tmp_path / "whole")
    weights = load_file(whole / "model.safetensors")
    weights["model.multi_modal_projector.image_proj_norm.bias"][3] = value
    make.write_safetensors(whole, weights)
    with pytest.raises(ValueError, match=r"image_proj_norm\.bias holds NaN or infinity"):
        merge(whole, tmp_path / "merged", layout=layout)
    assert not (tmp_path / "merged").exists()


def test_an_output_that_is_not_empty_is_refused(native: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(native, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="out is not empty; give another --output, or remove it"):
        merge(native, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_merge_that_answers_otherwise_is_not_saved(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(native, tmp_path / "adapter", Lora(r=4, targets="all"))
    unload = PeftModel.merge_and_unload if hasattr(PeftModel, "merge_and_unload") else None
    assert unload is None
    from peft.tuners.lora import LoraModel

    merged = LoraModel.merge_and_unload

    def spoilt(scale: float) -> Callable[..., Any]:
        def spoil(self: Any, *rest: Any, **named: Any) -> Any:
            model = merged(self, *rest, **named)
            shake(model, "decoder.layers", scale)
            return model

        return spoil

    for scale, message in ((1.0, r"the merged model answers \[.*nothing was saved"), (3e-3, "nothing was saved")):
        monkeypatch.setattr(LoraModel, "merge_and_unload", spoilt(scale))
        with pytest.raises(ValueError, match=message):
            merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- what is saved ---


def generated(model: Any, processor: Any, picture: Path) -> list[list[int]]:
    from PIL import Image

    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    ids = []
    for prompt in ("<OD>", "<CAPTION>"):
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        found = model.generate(**inputs, num_beams=1, early_stopping=False, max_new_tokens=12)
        ids.append(found[0].tolist())
    return ids


@pytest.mark.parametrize("base", ["native", "microsoft"])
def test_the_native_layout_loads_as_users_load_it(
    base: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    source: Path = request.getfixturevalue(base)
    unmerged = adapter(source, tmp_path / "adapter", Lora(r=4, targets="all"))
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(source))
    loaded: Any = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert type(processor).__name__ == "Florence2Processor"
    assert processor.image_processor.size == {"height": 64, "width": 64}
    picture = runs.pictures(tmp_path / "pictures", 1)[0]
    before = load_checkpoint(str(source))
    found = generated(loaded.eval(), processor, picture)
    assert all(len(ids) > 3 for ids in found)
    for ids, prompt in zip(found, ("<OD>", "<CAPTION>"), strict=True):
        text = runs.greedy(unmerged, before, picture, prompt, new_tokens=12)
        again = load_checkpoint(str(tmp_path / "merged"))
        assert runs.greedy(again.model, again, picture, prompt, new_tokens=12) == text
        assert _with_repeats(loaded, processor, picture, prompt) == text
        assert ids[:2] == [2, 0]
    assert loaded.config.image_token_id == processor.image_token_id == make.ROWS
    assert loaded.get_input_embeddings().weight.shape[0] == runs.ROWS
    assert load_checkpoint(str(tmp_path / "merged")).banned_grounding_phrases == before.banned_grounding_phrases
    assert loaded.generation_config.num_beams == 3
    assert loaded.generation_config.no_repeat_ngram_size == 3


def _with_repeats(model: Any, processor: Any, picture: Path, prompt: str) -> str:
    from PIL import Image

    with Image.open(picture) as opened:
        inputs = processor(text=prompt, images=opened.convert("RGB"), return_tensors="pt")
    settings: dict[str, Any] = {"num_beams": 1, "early_stopping": False, "no_repeat_ngram_size": 0}
    ids = model.generate(**inputs, **settings, max_new_tokens=12)[0]
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_rows_that_are_added_never_win(microsoft: Path) -> None:
    checkpoint = load_checkpoint(str(microsoft))
    plain = make.logits(checkpoint.model)
    make_native(checkpoint)
    assert checkpoint.tokenizer.token_to_id("<image>") == make.ROWS
    grown = make.logits(checkpoint.model)
    assert grown.shape[-1] == runs.ROWS
    assert torch.equal(grown[..., : make.ROWS], plain)
    # No more than <unk>, which comes first where they are equal.
    assert torch.equal(grown[..., make.ROWS :], plain[..., 3:4].expand(-1, -1, runs.ROWS - make.ROWS))
    assert bool((grown.argmax(-1) < make.ROWS).all())
    again = checkpoint.model.lm_head.weight
    assert again is checkpoint.model.model.language_model.shared.weight
    make_native(checkpoint)
    assert checkpoint.model.lm_head.weight is again


def test_rows_are_added_to_a_head_of_its_own(tmp_path: Path) -> None:
    model = runs.model(rows=make.ROWS)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    folder = make.write_microsoft(tmp_path / "base", model)
    state = make.microsoft_state(model) | {"language_model.lm_head.weight": model.lm_head.weight.detach().clone()}
    make.write_safetensors(folder, state)
    make.edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    make.edit_json(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))
    expected = make.logits(load_checkpoint(str(folder)).model)
    for layout in ("native", "microsoft"):
        merge(folder, tmp_path / layout, layout=layout)
        merged = load_checkpoint(str(tmp_path / layout))
        assert_logits(merged.model, expected, atol=0)
        assert not merged.model.config.tie_word_embeddings


@pytest.mark.parametrize("base", ["native", "microsoft"])
def test_microsofts_layout_is_microsofts(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(base)
    expected = make.logits(adapter(source, tmp_path / "adapter", Lora(r=4, targets="all")))
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(source), layout="microsoft")
    reference = runs.model(rows=make.ROWS)
    wanted = {name: tensor.shape for name, tensor in make.microsoft_state(reference).items()}
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == wanted
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    merged = load_checkpoint(str(tmp_path / "merged"))
    assert merged.layout == "microsoft"
    assert_logits(merged.model, expected[..., : make.ROWS], atol=1e-4)
    before = load_checkpoint(str(source))
    same = ("size", "image_mean", "image_std", "resample", "rescale_factor", "image_seq_length")
    assert {name: merged.preprocessor[name] for name in same} == {name: before.preprocessor[name] for name in same}
    assert merged.generation == before.generation
    for text in ("<OD>the cat", "cat<loc_1><loc_999>", "a\nb"):
        assert merged.tokenizer.encode(text).ids == before.tokenizer.encode(text).ids

    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    own, drop_path = make.microsoft_config(reference), before.model.config.vision_config.drop_path_rate
    assert config["vision_config"] == own["vision_config"] | {"drop_path_rate": drop_path, "enable_checkpoint": False}
    assert own.keys() <= config.keys()
    missing = own["text_config"].keys() - config["text_config"].keys()
    assert missing <= {"_name_or_path", "architectures", "id2label", "label2id", "transformers_version", *_generic(own)}
    for name in ("vocab_size", "d_model", "encoder_layers", "decoder_ffn_dim", "max_position_embeddings", "model_type"):
        assert config["text_config"][name] == own["text_config"][name]
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForCausalLM"}
    assert config["architectures"] == ["Florence2ForConditionalGeneration"]
    assert config["vocab_size"] == make.ROWS
    preprocessor = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert preprocessor["auto_map"]["AutoProcessor"].endswith("processing_florence2.Florence2Processor")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json"} <= files


def _generic(config: dict[str, Any]) -> set[str]:
    """Settings that a later merge leaves to generation_config.json."""
    return {"max_length", "length_penalty"} & config["text_config"].keys()


def test_microsofts_vocabulary_files_make_the_same_tokenizer(native: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(native))
    save_microsoft(checkpoint, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    merged = load_checkpoint(str(tmp_path / "saved"))
    for text in ("<OD>the cat", "the image", "cat<loc_1><loc_999>", "a\nb é"):
        assert merged.tokenizer.encode(text).ids == checkpoint.tokenizer.encode(text).ids


def test_a_checkpoint_that_was_saved_is_saved_the_same(native: Path, tmp_path: Path) -> None:
    for name, save in (("native", save_native), ("microsoft", save_microsoft)):
        first = load_checkpoint(str(native))
        make_native(first)
        save(first, tmp_path / name / "first")
        second: Checkpoint = load_checkpoint(str(tmp_path / name / "first"))
        make_native(second)
        save(second, tmp_path / name / "second")
        for path in (tmp_path / name / "first").iterdir():
            again = tmp_path / name / "second" / path.name
            if path.suffix == ".safetensors":
                one, other = load_file(path), load_file(again)
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one)
            else:
                assert path.read_text() == again.read_text(), path.name


def test_the_command(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(native, tmp_path / "adapter", Lora(r=4))
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/out: native layout, from {tmp_path}/adapter, 2 answers equal to the unmerged model's\n"
    )
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"florence2: {tmp_path}/out is not empty; give another --output, or remove it\n"
    command = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "microsoft"), "--base", str(native)]
    assert main([*command, "--layout", "microsoft"]) == 0
    assert "microsoft layout, from" in capsys.readouterr().out
    assert load_checkpoint(str(tmp_path / "microsoft")).layout == "microsoft"


def test_a_merged_checkpoint_exports(microsoft: Path, tmp_path: Path) -> None:
    from florence2_export.export import export

    adapter(microsoft, tmp_path / "adapter", Lora(r=4, targets="all"))
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(microsoft))
    manifest = export(str(tmp_path / "merged"), tmp_path / "export")
    assert manifest.sizes.max_position_embeddings == 128
    assert (tmp_path / "export" / "vision_encoder.onnx").is_file()


def test_an_adapter_goes_on_being_trained_where_it_was(native: Path, tmp_path: Path) -> None:
    expected = make.logits(adapter(native, tmp_path / "adapter", Lora(r=4, targets="all")))
    checkpoint = load_checkpoint(str(native))
    load_adapter(checkpoint.model, tmp_path / "adapter")
    assert_logits(checkpoint.model.eval(), expected, atol=1e-6)
