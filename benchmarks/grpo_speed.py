"""Seconds of a GRPO update against the same work done the plain way, and the share of time in each of its parts.

Both sides are `GRPOModule` under a Trainer at the demo's sizes, from the same random weights, on the same captions and
seeds: they draw the same images and take the same gradient, which is checked. The plain way draws image by image,
computes the logits of the whole vocabulary where those of the codes are needed, and takes the log-probs image by image.

    python benchmarks/grpo_speed.py              # some minutes, two cores, no other files needed
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer, seed_everything
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import runs
from measure import Run, Runs, claim, median, parser, publish, ratios
from simplear.data import TokenDataModule
from simplear.language_model import (
    CheckpointSettings,
    LanguageModel,
    LanguageModelConfig,
    save_checkpoint,
    train_text_tokenizer,
)
from simplear.rewards import SceneReward
from simplear.scenes import captions, metadata, sample_scene
from simplear.stages import GRPOModule
from simplear.visual_tokenizer import FSQAutoencoder, save_visual_tokenizer

PARTS = runs.GRPO_PARTS
EQUAL = 1e-3
"""Relative difference of the two gradients' norms; sums of single images in float32."""


class SceneAndBrightness(SceneReward):
    """The scene reward and the brightness, in which pictures of random weights differ too."""

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        return super().combine(parts) + parts["brightness"]

    def parts(self, images: Tensor, *args: Any) -> dict[str, Tensor]:
        return {**super().parts(images, *args), "brightness": images.mean(dim=(1, 2, 3))}


class FullVocabulary(LanguageModel):
    """Computes the logits of all ids, and then takes the codes'."""

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.lm_head(hidden)[..., self.layout.image_token_offset : self.layout.vocab_size]

    def image_log_probs(self, input_ids: Tensor, grid: tuple[int, int], **options: Any) -> tuple[Tensor, Tensor | None]:
        hidden = self.hidden_states(input_ids, self.training_positions(input_ids, grid), attention_mask=None)
        is_code = input_ids >= self.layout.image_token_offset
        logits = self.image_logits(hidden)[:, :-1] / options["temperature"]
        log_probs = logits.log_softmax(dim=-1)[is_code[:, 1:]].view(len(input_ids), grid[0] * grid[1], -1)
        codes = self.layout.codes_of_ids(input_ids[is_code]).view(len(input_ids), -1, 1)
        entropies = -(log_probs.exp() * log_probs).sum(dim=-1).detach() if options.get("with_entropies", True) else None
        return log_probs.gather(-1, codes)[..., 0], entropies


class PlainGRPOModule(GRPOModule):
    """The same training, done the plain way."""

    def load_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        model, tokenizer = super().load_language_model()
        return FullVocabulary(model.decoder, model.layout), tokenizer


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "grpo_speed")
    made.add_argument("--prompts", type=int, default=8, help="captions of a rollout")
    made.add_argument("--group-size", type=int, default=8, help="images of a caption")
    made.add_argument("--grid", type=int, default=8, help="codes along each side")
    made.add_argument("--rounds", type=int, default=7)
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.prompts, chosen.group_size, chosen.grid, chosen.rounds = 2, 2, 4, 2
    return chosen


def write_start(directory: Path, settings: argparse.Namespace) -> tuple[Path, Path]:
    """A checkpoint of the demo's sizes with random weights, and prompts; the settings get its number of codes."""
    seed_everything(0, verbose=False)
    model_config = yaml.safe_load((runs.CONFIGS / "pretrain.yaml").read_text())["model"]["init_args"]["language_model"]
    tokenizer_config = yaml.safe_load((runs.CONFIGS / "visual_tokenizer.yaml").read_text())["model"]["init_args"]
    rows = [(captions(scene, 0, n)[0], metadata(scene)) for n in range(600) if (scene := sample_scene(0, n))]
    train_text_tokenizer((caption for caption, _ in rows), 400, directory / "text_tokenizer")
    visual_tokenizer = FSQAutoencoder(**tokenizer_config["tokenizer"]["init_args"])
    save_visual_tokenizer(visual_tokenizer, directory / "visual_tokenizer")
    config = LanguageModelConfig(**{**model_config, "tokenizer": str(directory / "text_tokenizer")})
    model, text_tokenizer = config.build()
    settings.codebook_size = model.layout.codebook_size
    written = CheckpointSettings(
        image_token_offset=model.layout.image_token_offset,
        codebook_size=model.layout.codebook_size,
        grid=(settings.grid, settings.grid),
        downsample=visual_tokenizer.downsample,
        visual_tokenizer_fingerprint=visual_tokenizer.fingerprint,
    )
    visual = directory / "visual_tokenizer"
    save_checkpoint(directory / "start", model, text_tokenizer, written, visual_tokenizer=visual)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "metadata": scene}) + "\n" for text, scene in rows))
    return directory / "start", prompts


def update(way: type[GRPOModule], start: Path, prompts: Path, settings: argparse.Namespace) -> dict[str, float]:
    """What one training step logs, from the start."""
    plain = way is PlainGRPOModule
    module = way(
        str(start),
        SceneAndBrightness(),
        group_size=settings.group_size,
        micro_batch_size=1 if plain else None,
        rollout_batch_size=1 if plain else None,
        optimizer=torch.optim.AdamW,
    )
    options = {"codebook_size": settings.codebook_size, "caption_dropout": 0.0, "max_text_tokens": 64}
    data = TokenDataModule(str(prompts), settings.prompts, str(start), **options)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    modules = {"ours": GRPOModule, "plain": PlainGRPOModule}
    whole: Runs = {name: [] for name in modules}
    parts: dict[str, Runs] = {part: {name: [] for name in modules} for part in PARTS}
    with tempfile.TemporaryDirectory(prefix="simplear-benchmark-") as name:
        start, prompts = write_start(Path(name), settings)
        found = {way: update(module, start, prompts, settings) for way, module in modules.items()}  # warms up
        difference = abs(found["plain"]["policy/gradient_norm"] / found["ours"]["policy/gradient_norm"] - 1)
        if found["plain"]["reward/mean"] != found["ours"]["reward/mean"] or difference > EQUAL:
            raise AssertionError(f"the two ways do not do the same work, so their ratio means nothing: {found}.")
        with tqdm(total=settings.rounds * len(modules), desc="updates", unit="run") as progress:
            for number in range(settings.rounds):
                for way in list(modules)[:: -1 if number % 2 else 1]:
                    logged = update(modules[way], start, prompts, settings)
                    for part in PARTS:
                        parts[part][way].append(Run(logged[f"seconds/{part}"]))
                    whole[way].append(Run(sum(logged[f"seconds/{part}"] for part in PARTS)))
                    progress.update()
    images = settings.prompts * settings.group_size
    claims = [
        claim(f"a GRPO update of {images} images, ours over the plain way", ratios(whole, "ours", "plain")),
        *(
            claim(f"of it, {part}", ratios(parts[part], "ours", "plain"), note=share(parts, part))
            for part in ("rollout", "update")
        ),
        claim("gradient norm, relative difference", [difference], ("<=", EQUAL)),
    ]
    shares = {
        way: {part: median(parts[part][way]) / sum(median(parts[other][way]) for other in PARTS) for part in PARTS}
        for way in modules
    }
    publish("grpo_speed", settings, claims, {"share_of_time": shares, "reward": found["ours"]["reward/mean"]})


def share(parts: dict[str, Runs], part: str) -> str:
    """A part's share of our update, in words."""
    whole = sum(median(parts[other]["ours"]) for other in PARTS)
    return f"{100 * median(parts[part]['ours']) / whole:.0f} % of our update"


if __name__ == "__main__":
    main()
