"""Every configuration of the paper instantiates, and its sizes are the paper's."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from PIL import Image

from simplear.command_line import PARSER_MODE
from simplear.data import recaption, tokenize
from simplear.errors import UserError
from simplear.language_model import Adapter, load_checkpoint
from simplear.language_model.checkpoint import RELEASED_VISUAL_TOKENIZER
from simplear.language_model.rope import Qwen2Rope2DForCausalLM
from simplear.lightning_cli import ConfigurationCLI
from simplear.sequence import SPECIAL_TOKENS
from simplear.stages import GRPOModule, PretrainModule, SFTModule

CONFIGS = Path(__file__).parents[1] / "configs"
QWEN_TEXT_IDS = 151_665
QWEN_ROWS = 151_936
COSMOS_CODES = 64_000
VOCABULARY = QWEN_TEXT_IDS + len(SPECIAL_TOKENS) + COSMOS_CODES
MAX_TEXT = 512
MACHINES = ("cpu", "one-gpu", "gpu8", "a100x32")


class ConfigurationOnly(ConfigurationCLI):
    """Instantiates model, data, callbacks and strategy, but no Trainer: it would look for the GPUs."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        return None


def compose(*names: str, arguments: tuple[str, ...] = ()) -> ConfigurationOnly:
    files = [part for name in names for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return ConfigurationOnly([*files, *arguments], save_config_callback=None, run=False)


def test_vocabulary_of_the_paper() -> None:
    assert VOCABULARY == 215_672


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [("0.5b", 494_032_768, 551_140_224), ("1.5b", 1_543_714_304, 1_641_612_800)],
)
@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_parameter_counts_before_and_after_growth(size: str, before: int, after: int, rope: str) -> None:
    names = ["paper/pretrain", f"paper/{size}"] + (["paper/rope-2d"] if rope == "2d" else [])
    config = compose(*names).model.config
    with torch.device("meta"):
        original, grown = config.random_decoder(QWEN_ROWS), config.random_decoder(VOCABULARY)
    assert sum(parameter.numel() for parameter in original.parameters()) == before
    assert sum(parameter.numel() for parameter in grown.parameters()) == after
    assert isinstance(grown, Qwen2Rope2DForCausalLM) == (rope == "2d")


def test_texts_beside_the_images_of_pretraining() -> None:
    composed = compose("paper/pretrain", "paper/0.5b", "paper/texts")
    data, plain = composed.datamodule, compose("paper/pretrain", "paper/0.5b").datamodule
    assert data.paths[:1] == plain.paths and data.weights == [0.9, 0.1] and plain.weights is None
    assert len(data.validation_paths) == 2 and composed.model.objective.text_only_loss_weight == 1


@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
@pytest.mark.parametrize(("stage", "pixels", "codes"), [("pretrain", 512, 1_024), ("sft", 1024, 4_096)])
def test_sequences_fit(size: str, stage: str, pixels: int, codes: int) -> None:
    composed = compose("paper/pretrain", f"paper/{size}")
    data = compose(f"paper/{stage}").datamodule
    grid = pixels // 16
    assert grid * grid == codes
    longest = codes + data.max_text_tokens + 2
    assert data.max_text_tokens == MAX_TEXT
    assert longest <= composed.model.config.architecture["max_position_embeddings"]


@pytest.mark.parametrize("machine", MACHINES)
def test_pretraining_compositions(machine: str) -> None:
    for size, scratch, rope in itertools.product(("0.5b", "1.5b"), (False, True), (False, True)):
        names = ["paper/pretrain", f"paper/{size}"]
        names += ["paper/from-scratch"] * scratch + ["paper/rope-2d"] * rope + [f"paper/{machine}"]
        composed = compose(*names)
        assert isinstance(composed.model, PretrainModule)
        assert (composed.model.config.pretrained is None) == scratch
        assert composed.model.config.rope == ("2d" if rope else "1d")
        assert composed.datamodule.global_batch_size == 256
        optimizer = composed.model.optimizer([torch.nn.Parameter(torch.zeros(2))])
        assert optimizer.defaults["lr"] == 1e-4 and optimizer.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("size", [(), ("paper/0.5b",), ("paper/1.5b",)])
def test_fine_tuning_compositions(machine: str, size: tuple[str, ...]) -> None:
    composed = compose("paper/sft", *size, f"paper/{machine}")
    assert isinstance(composed.model, SFTModule)
    assert composed.model.optimizer([torch.nn.Parameter(torch.zeros(2))]).defaults["lr"] == 2e-5
    trainer = composed.config["trainer"]
    devices = trainer["devices"] * trainer["num_nodes"]
    assert 256 % (devices * (trainer["accumulate_grad_batches"] or 1)) == 0


@pytest.mark.parametrize(
    "names", [("sft", "1.5b", "sft-24gb"), ("sft", "0.5b", "one-gpu"), ("grpo", "1.5b", "grpo-24gb")]
)
def test_an_adapter_is_one_file_more(names: tuple[str, ...]) -> None:
    composed = compose(*(f"paper/{name}" for name in names), "paper/lora")
    assert composed.model.adapter == Adapter(r=16, alpha=32) and composed.config["trainer"]["precision"] == "bf16-mixed"
    assert composed.model.optimizer([torch.nn.Parameter(torch.zeros(2))]).defaults["lr"] == 1e-4


def test_the_papers_visual_tokenizer_is_the_default() -> None:
    """And that of GRPO and fine-tuning is the checkpoint's."""
    assert compose("paper/pretrain", "paper/0.5b").model.visual_tokenizer_path == RELEASED_VISUAL_TOKENIZER
    assert compose("paper/sft", "paper/0.5b").model.visual_tokenizer_path is None


@pytest.mark.parametrize(
    ("overlay", "visual_tokenizer", "codes"),
    [
        ("janus", "deepseek-community/Janus-Pro-1B", 16_384),
        ("fsq", "checkpoints/paper/visual_tokenizer", COSMOS_CODES),
    ],
)
def test_another_visual_tokenizer(overlay: str, visual_tokenizer: str, codes: int) -> None:
    composed = compose("paper/pretrain", f"paper/{overlay}", "paper/0.5b")
    assert composed.model.config.codebook_size == composed.model.generation.top_k == codes
    assert composed.model.visual_tokenizer_path == visual_tokenizer
    assert composed.datamodule.paths == [f"data/paper/tokens-512-{overlay}/train/*"]


def paths(stage: str, *overlays: str, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a stage reads and writes: `reads` the checkpoint, `shards`, and everything else that it `writes`."""
    config = compose(f"paper/{stage}", *(f"paper/{name}" for name in overlays), arguments=arguments).config
    trainer = config["trainer"]
    (callback,) = [each["init_args"] for each in trainer["callbacks"] if "HuggingFace" in each["class_path"]]
    logger = trainer["logger"]["init_args"]
    return {
        "reads": config["model"]["init_args"].get("checkpoint"),
        "shards": [*config["data"]["init_args"]["paths"], *(config["data"]["init_args"]["validation_paths"] or [])],
        "export": str(callback["export_dir"]),
        "writes": {
            str(callback["export_dir"]),
            str(callback["dirpath"]),
            f"{logger['save_dir']}/{logger['name']}/{logger['version']}",
        },
    }


CHAINS = [("0.5b",), ("1.5b",), ("0.5b", "from-scratch", "rope-2d"), ("1.5b", "janus", "texts")]


def test_each_stage_reads_what_the_one_before_wrote_and_no_two_write_to_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes, variants and rewards, on any machine."""
    monkeypatch.setattr(ConfigurationOnly, "instantiate_classes", lambda self: None)
    read, places = {}, []
    for chain in CHAINS:
        pretraining, fine_tuning = paths("pretrain", *chain), paths("sft", *chain)
        variants = ("--run.name+=texts",) if chain[-1] == "texts" else ()
        reinforced = paths("grpo", *(name for name in chain if name != "texts"), arguments=variants)
        assert (fine_tuning["reads"], reinforced["reads"]) == (pretraining["export"], fine_tuning["export"])
        read[chain] = fine_tuning["export"]
        places += [place for each in (pretraining, fine_tuning, reinforced) for place in each["writes"]]
    for overlays in (("hps",), ("hps", "grpo-release")):
        reinforced = paths("grpo", "0.5b", *overlays)
        assert reinforced["reads"] == read[("0.5b",)]
        places += reinforced["writes"]
    assert len(places) == len(set(places)) == 3 * (3 * len(CHAINS) + 2)
    assert read[("1.5b", "janus", "texts")] == "checkpoints/paper/sft-1.5b-janus-texts"
    on_another_machine = paths("sft", "0.5b", "gpu8", arguments=("--trainer.default_root_dir", "elsewhere"))
    assert (on_another_machine["reads"], on_another_machine["export"]) == (
        "elsewhere/pretrain-0.5b",
        "elsewhere/sft-0.5b",
    )


def test_every_size_and_variant_has_words_of_its_own() -> None:
    """Machines have none, so that a run may go on with another one."""
    words: dict[str, str] = {}
    for file in (CONFIGS / "paper").glob("*.yaml"):
        run = OmegaConf.load(file).get("run", {})
        words |= {word: file.stem for key in ("name+", "stage+") for word in run.get(key, [])}
        assert not (file.stem in MACHINES and run)
    variants = {"0.5b", "1.5b", "from-scratch", "rope-2d", "texts", "janus", "fsq", "hps", "grpo-release"}
    assert variants < set(words.values()) and words["24gb"].endswith("-24gb")


@pytest.mark.parametrize(("stage", "size"), [("pretrain", "512"), ("sft", "1024")])
def test_trainings_read_what_is_tokenized(monkeypatch: pytest.MonkeyPatch, stage: str, size: str) -> None:
    """By configs/paper/data and the Makefile."""
    monkeypatch.setattr(ConfigurationOnly, "instantiate_classes", lambda self: None)
    parser = ArgumentParser(parser_mode=PARSER_MODE)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(tokenize)
    commands = subprocess.run(
        ["make", "-n", "-s", "-o", ".venv/.ready", f"paper-tokenize-{size}"],
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
    ).stdout
    (corpora,) = re.findall(r"for set in ([^;]+);", commands)
    files = {name: str(CONFIGS / f"paper/data/{name}.yaml") for name in (size, *corpora.split())}
    shared = files.pop(size)
    written = [parser.parse_args(["--config", shared, "--config", file]).out for file in files.values()]
    pattern, held_out = paths(stage, "0.5b")["shards"]
    assert len(written) > 2 and written[-1] == held_out
    assert all(fnmatch(directory, pattern) for directory in written[:-1]) and not fnmatch(held_out, pattern)


def test_recaptioning_of_the_papers_size() -> None:
    parser = ArgumentParser(parser_mode=PARSER_MODE)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(recaption, as_positional=False)
    config = ["--config", str(CONFIGS / "paper/recaption.yaml"), "--out", "captions"]
    source = ["--source", "ScenesSource", "--source.count", "1", "--source.resolution", "64"]
    options = parser.instantiate_classes(parser.parse_args([*config, *source]))
    assert options.captioner.model_name == "Qwen/Qwen2-VL-7B-Instruct" and options.devices == 8


def test_visual_tokenizer_of_the_papers_size(tmp_path: Path) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "picture.png")
    (tmp_path / "picture.txt").write_text("black")
    sources = ("source", "validation_source")
    paths = [part for name in sources for part in (f"--data.init_args.{name}.init_args.path", str(tmp_path))]
    composed = compose("paper/visual_tokenizer", arguments=tuple(paths))
    assert composed.model.tokenizer.codebook_size == COSMOS_CODES
    assert composed.model.tokenizer.downsample == 16


@pytest.mark.parametrize("reward", ["clip", "hps"])
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
@pytest.mark.parametrize("overlay", [None, "grpo-release", "grpo-24gb"])
def test_grpo_compositions(reward: str, size: str, overlay: str | None) -> None:
    overlays = [f"paper/{name}" for name in (size, "hps" if reward == "hps" else None, overlay) if name]
    composed = compose("paper/grpo", *overlays)
    stage, trainer = composed.model, composed.config["trainer"]
    assert isinstance(stage, GRPOModule) and stage.visual_tokenizer_path is None
    assert type(stage.reward).__name__ == {"clip": "CLIPReward", "hps": "HPSv2Reward"}[reward]
    assert composed.datamodule.global_batch_size * stage.group_size == 28
    assert composed.datamodule.global_batch_size % trainer["devices"] == 0
    optimizer = stage.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert optimizer.defaults["lr"] == (1e-6 if overlay == "grpo-release" else 1e-5)
    assert (stage.lr_scheduler is None) == (overlay != "grpo-release")
    if overlay == "grpo-release":
        scheduler = stage.lr_scheduler(optimizer)
        assert scheduler.total_steps == trainer["max_steps"]


def test_overlay_changes_what_another_file_refers_to(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {language_model: {tokenizer: somewhere/else}}}")
    composed = compose("paper/pretrain", "paper/0.5b", arguments=("--config", str(overlay)))
    assert composed.datamodule.tokenizer_path == "somewhere/else"


def test_a_base_is_read_before_the_file_that_names_it_and_once(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("run: {name: [first]}\ntrainer: {max_steps: 1, max_epochs: 3}")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nrun: {name+: [second]}\ntrainer: {max_steps: 2}")
    (tmp_path / "third.yaml").write_text(f"base: ../{tmp_path.name}/first.yaml\nrun: {{name+: [third]}}")
    files = [f"--config={tmp_path}/second.yaml", "--config", f"{tmp_path}/third.yaml"]
    config = compose("demo/pretrain", arguments=(*files, "--trainer.min_steps", "1")).config
    trainer = config["trainer"]
    assert config["run"]["name"] == ["first", "second", "third"]
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["min_steps"], config["base"]) == (2, 3, 1, None)
    (tmp_path / "third.yaml").write_text("base: nowhere.yaml")
    with pytest.raises(UserError, match=r"third.yaml names .*nowhere.yaml as its base, which does not exist"):
        compose(arguments=("--config", f"{tmp_path}/third.yaml"))


@pytest.mark.parametrize("name", sorted({path.stem for path in (CONFIGS / "demo").glob("*.yaml")} - {"base"}))
def test_demo_configurations_parse(name: str) -> None:
    if name.startswith(("tokenize", "text_tokenizer")):
        from simplear.data import train_text_tokenizer_on

        parser = ArgumentParser(parser_mode=PARSER_MODE)
        parser.add_argument("--config", action="config")
        parser.add_function_arguments(tokenize if name.startswith("tokenize") else train_text_tokenizer_on)
        parsed = parser.parse_args(["--config", str(CONFIGS / "demo" / f"{name}.yaml")])
        assert parsed.source.class_path == "simplear.data.ScenesSource"
    else:
        composed = compose(f"demo/{name}")
        assert composed.config["trainer"]["max_steps"] > 0


def tiny_overrides(directory: Path, text_tokenizer: str, visual_tokenizer: str, shards: str) -> dict[str, str]:
    """What makes the paper's pretraining small enough for two CPU processes; strategy and precision stay."""
    return {
        "trainer.accelerator": "cpu",
        "trainer.devices": "2",
        "trainer.num_nodes": "1",
        "trainer.default_root_dir": str(directory),
        "trainer.val_check_interval": "2",
        "model.init_args.language_model.tokenizer": text_tokenizer,
        "model.init_args.language_model.codebook_size": "27",
        "model.init_args.language_model.architecture": (
            "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, "
            "num_key_value_heads: 1, max_position_embeddings: 600, tie_word_embeddings: true}"
        ),
        "model.init_args.visual_tokenizer": visual_tokenizer,
        "data.init_args.paths": shards,
        "data.init_args.validation_paths": shards,
        "data.init_args.global_batch_size": "8",
        "data.init_args.num_workers": "0",
    }


@pytest.mark.long
@pytest.mark.parametrize(("size", "rope"), [("0.5b", "1d"), ("1.5b", "2d")])
def test_the_papers_composition_trains_and_resumes_on_two_processes(
    tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str, size: str, rope: str
) -> None:
    """DDP or FSDP2, bf16, activation checkpointing, chunked head, sampling: all of it but the size and the GPUs."""
    names = ["pretrain", size, "from-scratch", *(["rope-2d"] if rope == "2d" else []), "a100x32"]
    configs = [part for name in names for part in ("--config", str(CONFIGS / "paper" / f"{name}.yaml"))]
    overrides = tiny_overrides(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards)
    options = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    for steps in ("3", "6"):
        command = [sys.executable, "-m", "simplear.cli", "fit", *configs, *options]
        command += ["--trainer.max_steps", steps, "--ckpt_path", "last"]
        finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert f"step {steps} of {steps}" in finished.stdout
    assert "step 3 of 6" not in finished.stdout, "the second run went on from the first"
    name = f"pretrain-{size}-scratch" + ("-rope-2d" if rope == "2d" else "")
    assert load_checkpoint(tmp_path / name).model.rope == rope


LAUNCHERS = sorted((CONFIGS / "paper" / "launch").iterdir())


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda script: script.name)
def test_launch_files_are_scripts(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(script)]).returncode == 0
    # What they name exists.
    named = re.findall(r"configs/paper/[\w./-]+\.(?:yaml|sbatch|sh)", script.read_text())
    assert named and all((CONFIGS.parent / name).is_file() for name in named)


def test_the_sbatch_file_starts_a_task_a_gpu(tmp_path: Path) -> None:
    """As the machine of a100x32.yaml has; `srun` here is one that prints what it is asked to run."""
    script = CONFIGS / "paper" / "launch" / "slurm.sbatch"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), re.MULTILINE))
    trainer = compose("paper/pretrain", "paper/a100x32").config["trainer"]
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == trainer["devices"]
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run([script, "--config", "x y.yaml"], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == "--wait=60 .venv/bin/simplear fit --config x y.yaml --ckpt_path last"


@pytest.mark.long
def test_the_torchrun_file_trains_and_goes_on_after_a_signal(
    tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str
) -> None:
    """Two processes with FSDP2 and gloo. SIGTERM to one of them: both save, and torchrun starts them again."""
    overrides = {
        **tiny_overrides(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards),
        "trainer.max_steps": "400",
    }
    names = ["pretrain", "1.5b", "from-scratch", "a100x32"]
    configs = [part for name in names for part in ("--config", str(CONFIGS / "paper" / f"{name}.yaml"))]
    options = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GPUS": "2",
        "PORT": "0",
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
    }
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [CONFIGS / "paper" / "launch" / "torchrun.sh", *configs, *options], stdout=out, stderr=out, env=environment
        )
    while process.poll() is None and "step 40 of 400" not in log.read_text():
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    assert process.wait() == 0, log.read_text()[-3000:]
    assert "the state of step" in log.read_text() and "step 400 of 400" in log.read_text()
    assert log.read_text().count("step 40 of 400") == 1, "the second start went on from the state"
    assert load_checkpoint(tmp_path / "pretrain-1.5b-scratch").model.rope == "1d"
