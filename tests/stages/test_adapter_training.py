"""Fine-tuning and reinforcement learning with an adapter: what is trained, kept, resumed, exported and refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from simplear.callbacks import AtomicCheckpoint, HuggingFaceCheckpoint
from simplear.cli import main
from simplear.data import TokenDataModule
from simplear.export import export
from simplear.generation import make_engine
from simplear.language_model import (
    Adapter,
    CheckpointSettings,
    LanguageModel,
    load_checkpoint,
    merged_model,
    save_checkpoint,
)
from simplear.sequence import prompt_sequence
from simplear.stages import GRPOModule, PretrainModule, SFTModule
from simplear.stages.grpo_objective import grpo_loss
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import (
    CAPTIONS,
    CODEBOOK,
    DOWNSAMPLE,
    Brightness,
    make_batch,
    make_shards,
    make_trainer,
    model_config,
    write_grpo,
    write_sft,
)

GRID = (2, 3)
STEPS = 4
STAGES = {"sft": SFTModule, "grpo": GRPOModule}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> Path:
    """A directory with ``start``, a checkpoint whose distributions are far from uniform, ``shards`` and prompts."""
    root = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(40)
    fingerprint = load_visual_tokenizer(tiny_visual_tokenizer).fingerprint
    settings = CheckpointSettings(
        model.layout.image_token_offset, CODEBOOK, GRID, DOWNSAMPLE, visual_tokenizer_fingerprint=fingerprint
    )
    save_checkpoint(root / "start", model, tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
    make_shards(root / "shards", tiny_visual_tokenizer, GRID)
    (root / "prompts.txt").write_text("\n".join(CAPTIONS[:4] * 3))
    return root


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def train(root: Path, place: Path, stage: str, adapter: Adapter | None, **options: Any) -> Any:
    """The stage after some steps; its states and its checkpoint are under ``place``."""
    seed_everything(0, verbose=False)
    reinforced = stage == "grpo"
    fields = {"reward": Brightness(), "group_size": 3, "inner_updates": 2, "beta": 0.1} if reinforced else {}
    fields |= options.pop("fields", {})
    checkpoint = str(options.pop("start", root / "start"))
    module = STAGES[stage](checkpoint, optimizer=adamw, adapter=adapter, **fields)
    data = TokenDataModule(
        str(root / "prompts.txt") if reinforced else [str(root / "shards")],
        global_batch_size=4,
        tokenizer=checkpoint,
        max_text_tokens=40,
        **({"caption_dropout": 0.0, "codebook_size": CODEBOOK} if reinforced else {}),
    )
    keep = HuggingFaceCheckpoint(
        export_dir=str(place / "model"),
        dirpath=place / "states",
        filename="{step}",
        every_n_train_steps=2,
        save_last=True,
        save_top_k=-1,
    )
    resume = options.pop("resume", None)
    defaults = {"max_epochs": -1, "max_steps": STEPS, "callbacks": [keep], "enable_checkpointing": True}
    trainer = make_trainer(place, **{**defaults, **options})
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return module


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(load_checkpoint(directory).model.state_dict())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, weight in one.items() if not torch.equal(weight, other[name])] == []


@pytest.mark.parametrize(
    ("precision", "code_rows"), [("32-true", False), ("32-true", True), ("bf16-mixed", True), ("bf16-true", False)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_is_trained_kept_resumed_and_exported(
    root: Path, tmp_path: Path, stage: str, code_rows: bool, precision: Any
) -> None:
    adapter = Adapter(r=2, code_rows=code_rows)
    module = train(root, tmp_path / "whole", stage, adapter, precision=precision)
    before = weights(root / "start")
    own = dict(module.language_model.named_parameters())
    trained = {name for name, weight in own.items() if weight.requires_grad}
    # Seven matrices with two beside each in both layers; embedding and head.
    assert len(trained) == 2 * 7 * 2 + 2 * code_rows
    assert all("lora_" in name or name.endswith(".rows") for name in trained)
    optimized = {id(weight) for group in module.optimizers().param_groups for weight in group["params"]}
    assert optimized == {id(own[name]) for name in trained}
    for name, weight in own.items():
        wide = precision == "32-true" or (precision == "bf16-mixed" and name in trained)
        assert weight.dtype == (torch.float32 if wide else torch.bfloat16)
        if name not in trained:
            assert torch.equal(weight, before[name.replace(".base_layer", "")].to(weight.dtype)), name

    path = tmp_path / "whole" / "states" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["state_dict"].keys() == {f"language_model.{name}" for name in trained}
    assert len(state["optimizer_states"][0]["state"]) == len(trained)

    # What training keeps beside the state, leaves at its end, and `simplear export` makes of the state.
    merged = dict(merged_model(module.language_model).state_dict())
    export(str(path), out=str(tmp_path / "out"))
    for directory in (path.with_suffix(""), tmp_path / "whole" / "model", tmp_path / "out"):
        assert_equal(weights(directory), merged)
        assert load_checkpoint(directory).settings == load_checkpoint(path.with_suffix("")).settings
    moved = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}
    assert precision != "32-true" or len(moved) == 7 * 2 + 2 * code_rows
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is Qwen2ForCausalLM
    if precision == "32-true":
        ids = torch.arange(300, 330)[None] % module.language_model.layout.vocab_size
        with torch.no_grad():
            expected = module.language_model.decoder.eval()(ids).logits
            torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    # Stopped in the middle and resumed, it is the same training.
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "states" / "step=2", tmp_path / "again" / "states" / "step=2")
    resume = str(shutil.copy(tmp_path / "whole" / "states" / "step=2.ckpt", tmp_path / "again" / "states"))
    again = train(root, tmp_path / "again", stage, adapter, precision=precision, resume=resume)
    assert_equal(dict(again.language_model.state_dict()), dict(module.language_model.state_dict()))
    assert_equal(weights(tmp_path / "again" / "model"), merged)


def test_an_averaged_adapter_is_kept_and_resumed(root: Path, tmp_path: Path) -> None:
    """Beside which Lightning's callback keeps the weights that are trained."""

    def train_with(place: Path, **options: Any) -> dict[str, Tensor]:
        keep = AtomicCheckpoint(dirpath=place, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        return dict(
            train(root, place, "sft", Adapter(r=2), callbacks=[WeightAveraging(), keep], **options).state_dict()
        )

    whole = train_with(tmp_path / "whole")
    path = tmp_path / "whole" / "step=2.ckpt"
    state = torch.load(path, weights_only=True)
    assert len(state["state_dict"]) == len(state["current_model_state"]) == 28
    assert_equal(train_with(tmp_path / "again", resume=str(path)), whole)


@pytest.mark.parametrize(
    ("engine", "precision"), [("fused", "32-true"), ("cached", "32-true"), ("fused", "bf16-mixed")]
)
@pytest.mark.parametrize("code_rows", [False, True])
def test_grpo_draws_with_the_adapter_and_its_reference_is_the_model_without(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, precision: Any, code_rows: bool
) -> None:
    found: list[dict[str, float]] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        loss, statistics = grpo_loss(*arguments, **options)
        found.append({name: float(value) for name, value in statistics.items()})
        return loss, statistics

    monkeypatch.setattr("simplear.stages.grpo.grpo_loss", noted)
    adapter = Adapter(r=2, code_rows=code_rows)
    module = train(root, tmp_path, "grpo", adapter, precision=precision, fields={"engine": engine}, callbacks=[])
    assert found[0]["kl"] == 0.0 and found[0]["ratio_min"] == found[0]["ratio_max"] == 1.0
    assert len(found) == STEPS and all(later["kl"] > 0.0 for later in found[1:])
    reference = module._reference
    assert reference.model is module.language_model, "not a copy"
    if precision != "32-true":
        return
    model, start = module.language_model, load_checkpoint(root / "start").model
    ids = make_batch(model, module.text_tokenizer, GRID)["input_ids"]
    (log_probs,) = reference.log_probs([ids], GRID)
    assert torch.equal(log_probs, start.image_log_probs(ids, GRID)[0])
    prompts = [prompt_sequence([5, 7, 9], model.layout)] * 4

    def draw(policy: LanguageModel) -> Tensor:
        return make_engine("cached", policy.eval()).generate(prompts, prompts, GRID, module.sampling, [1, 2, 3, 4])[0]

    drawn = module._engine.generate(prompts, prompts, GRID, module.sampling, [1, 2, 3, 4])[0]
    assert torch.equal(drawn, draw(merged_model(model))) and not torch.equal(drawn, draw(start))


# What is refused


@pytest.fixture(scope="module")
def states(root: Path) -> dict[str, str]:
    """States of fine-tuning with an adapter and without."""
    adapters = {"adapter": Adapter(r=2), "whole": None}
    for name, adapter in adapters.items():
        train(root, root / name, "sft", adapter, max_steps=2)
    return {name: str(root / name / "states" / "last.ckpt") for name in adapters}


@pytest.mark.parametrize(
    ("state", "adapter", "words"),
    [
        ("adapter", None, r"last\.ckpt was trained with another adapter: r 2 there, None here.*simplear export"),
        ("whole", Adapter(r=2), r"last\.ckpt was trained with no adapter: r None there, 2 here"),
        ("adapter", Adapter(r=3), r"last\.ckpt was trained with another adapter: r 2 there, 3 here\."),
        ("adapter", Adapter(2, 9.0, ["q_proj"]), r"alpha None there, 9\.0 here; target_modules .* there, \['q_proj'\]"),
    ],
)
def test_a_state_of_another_kind_is_refused(
    root: Path, states: dict[str, str], tmp_path: Path, state: str, adapter: Adapter | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(root, tmp_path, "sft", adapter, resume=states[state])


def test_an_adapter_for_another_checkpoint_is_refused(root: Path, states: dict[str, str], tmp_path: Path) -> None:
    other = root / "whole" / "model"
    with pytest.raises(ValueError, match=r"trained with another adapter: added_to [0-9a-f]+ there, [0-9a-f]+ here"):
        train(root, tmp_path, "sft", Adapter(r=2), resume=states["adapter"], start=other)


def test_stages_and_strategies_without_adapters(root: Path, tiny_text_tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"too small for pretraining.* leave model\.init_args\.adapter to fine-tuning"):
        PretrainModule(model_config(tiny_text_tokenizer), adapter=Adapter())
    with pytest.raises(ValueError, match=r"an adapter does not go with FSDP2.*--trainer\.strategy ddp"):
        train(root, tmp_path, "sft", Adapter(), strategy="fsdp2")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{r: 2, target_modules: [lm_head]}", "lm_head"),
        ("{r: 0}", "r must be at least 1"),
        ("{rank: 2}", "rank"),
    ],
)
def test_the_command_line_takes_one_key(
    root: Path, tiny_visual_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, words: str
) -> None:
    config = write_sft(tmp_path, str(root / "start"), tiny_visual_tokenizer, str(root / "shards"))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config), "--model.init_args.adapter", value])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_reinforcement_learning_goes_on_from_an_exported_adapter(
    root: Path, states: dict[str, str], tiny_visual_tokenizer: str, tmp_path: Path
) -> None:
    export(states["adapter"], out=str(tmp_path / "sft"))
    config = write_grpo(tmp_path, str(tmp_path / "sft"), tiny_visual_tokenizer)
    main(["fit", "--config", str(config), "--model.init_args.adapter", "{r: 2}", "--trainer.max_steps", "2"])
    before, after = weights(tmp_path / "sft"), weights(tmp_path / "run" / "model")
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
