"""What every stage that trains a language model shares: building, sharding, checks of the data, and the export.

A subclass says where its model comes from (`load_language_model`) and what one training step does.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from simplear.data import TokenDataModule
from simplear.errors import UserError
from simplear.language_model import (
    Adapter,
    CheckpointSettings,
    GenerationDefaults,
    LanguageModel,
    add_adapter,
    checkpoint_hash,
    load_checkpoint,
    trained_names,
)
from simplear.sequence import MAX_TEXT_TOKENS
from simplear.stages.decoder_layers import ActivationCheckpointing, checkpoint_activations, compile_decoder_layers
from simplear.stages.optimized import OptimizedModule
from simplear.stages.sharding import refuse_fsdp1, shard_language_model
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Autocast's dtype, by the Trainer's precision."""
MODEL_STATES = {"state_dict", "current_model_state"}
"""Keys of a training state that hold weights; the second is that of Lightning's averaging callbacks."""
DEFAULT_DOWNSAMPLE = 16
"""Of Cosmos DV8x16x16, the paper's visual tokenizer."""


class LanguageModelModule(OptimizedModule):
    """Base of the stages that train a language model.

    Args:
        visual_tokenizer: directory or hub id of the visual tokenizer that made the codes; the checkpoint gets a copy.
        optimizer: any torch optimizer class by class_path. Norms and biases get no weight decay.
        lr_scheduler: any scheduler class by class_path, stepped every optimizer step; None keeps the rate constant.
        generation: defaults of generation that are written into the checkpoint.
        activation_checkpointing: what a layer computes again in the backward pass instead of keeping it: `none`;
            `selective`, all but matrix products and attention; `full`, everything, a third more arithmetic.
        packed: cut the padding out of each micro-batch: same losses, and only attention still computes it.
        adapter: train a LoRA adapter and leave all other weights as they are, in autocast's dtype. States hold the
            adapter alone; exports are the merged model.
        compile_layers: run the decoder layers under `torch.compile`, which needs a C++ compiler; the first steps
            compile, which takes minutes.
    """

    language_model: LanguageModel
    text_tokenizer: PreTrainedTokenizerBase
    checkpoint: str
    """Directory or hub id to start from, in stages that start from one."""

    def __init__(
        self,
        visual_tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationDefaults | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        packed: bool = False,
        compile_layers: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.visual_tokenizer_path = visual_tokenizer
        self.generation = generation
        self.activation_checkpointing = activation_checkpointing
        self.packed = packed
        self.compile_layers = compile_layers
        self.adapter = adapter
        self.grid: tuple[int, int] | None = None
        """Of the last training batch with images."""
        self.start_directory: Path | None = None
        """Of the checkpoint that training starts from; None for a new model."""
        self.start_settings: CheckpointSettings | None = None
        """Of that checkpoint."""

    def load_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """The model to train and its text tokenizer, whole, on CPU, in float32.

        By default those of ``checkpoint``, whose settings also apply where the configuration has none.
        """
        loaded = load_checkpoint(self.checkpoint, dtype=torch.float32)
        self.start_directory, self.start_settings = loaded.directory, loaded.settings
        self.generation = self.generation or loaded.settings.generation
        if self.visual_tokenizer_path is None and loaded.visual_tokenizer_path is not None:
            self.visual_tokenizer_path = str(loaded.visual_tokenizer_path)
        return loaded.model, loaded.tokenizer

    def configure_model(self) -> None:
        """Build the model on CPU, and shard it under FSDP2."""
        if hasattr(self, "language_model"):
            return
        if self._trainer is not None:
            refuse_fsdp1(self.trainer.strategy)
        model, self.text_tokenizer = self.load_language_model()
        if self.adapter is not None:
            precision = None if self._trainer is None else getattr(self.trainer.precision_plugin, "precision", None)
            add_adapter(model, self.adapter, COMPUTE_DTYPES.get(str(precision)))
        model.train()
        rank = None if self.adapter is None else self.adapter.r
        checkpoint_activations(model.decoder, self.activation_checkpointing, rank)
        self.on_model_built(model)
        if self.compile_layers:
            compile_decoder_layers(model.decoder)
        if self.sharding_mesh is not None:
            shard_language_model(model, self.sharding_mesh, self.trainer.precision)
            # FSDP2 keeps the buffers of its first gathering: made in inference mode, they could not be trained with.
            self.trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        self.language_model = model

    @property
    def sharding_mesh(self) -> DeviceMesh | None:
        """Processes that weights are sharded over under FSDP2; None under other strategies."""
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return None
        assert self.device_mesh is not None, "the strategy sets the mesh before configure_model."
        return self.device_mesh["data_parallel"]

    def on_model_built(self, model: LanguageModel) -> None:
        """Hook: the model is whole, and not yet sharded or trained."""

    def configure_callbacks(self) -> list[Callback]:
        """As every stage; raises UserError for an adapter under FSDP2."""
        if self.adapter is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "an adapter does not go with FSDP2, which shards weights of one dtype. Its gradients and optimizer are "
                "small: take DDP (--trainer.strategy ddp)."
            )
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        """Check that data and model belong together, before the first step is paid for."""
        data, layout = self._data, self.language_model.layout
        fingerprints = {
            "the token shards": None if data is None else data.fingerprint,
            "the checkpoint": self._start_fingerprint,
            str(self.visual_tokenizer_path): self.visual_tokenizer_path and self.visual_tokenizer.fingerprint,
        }
        if len(set(fingerprints.values()) - {None}) > 1:
            stated = ", ".join(f"{name}: {value[:12]}…" for name, value in fingerprints.items() if value)
            raise UserError(
                f"these belong to different visual tokenizers: {stated}. Tokenize again with the checkpoint's, or name "
                "the one that made the codes (--model.init_args.visual_tokenizer)."
            )
        if data is None:
            return
        if data.codebook_size != layout.codebook_size:
            raise UserError(
                f"the token shards have a codebook of {data.codebook_size} codes, the model one of "
                f"{layout.codebook_size}: tokenize with the checkpoint's visual tokenizer."
            )
        if data.layout != layout:
            raise UserError(
                f"--data.tokenizer {data.tokenizer_path} gives {data.layout}, the model's text tokenizer {layout}: "
                "name the same one for both."
            )
        for height, width in self.grids(data):
            longest = height * width + data.max_text_tokens + 2
            if longest > self.language_model.max_positions:
                raise UserError(
                    f"a {height} × {width} grid with up to {data.max_text_tokens} caption tokens takes {longest} "
                    f"positions, the model has {self.language_model.max_positions}: lower --data.max_text_tokens or "
                    "raise max_position_embeddings (--model.init_args.language_model.architecture)."
                )

    on_validation_start = on_test_start = on_fit_start
    """Validation and test may also run on their own."""

    @property
    def trained_module(self) -> LanguageModel:
        """The language model."""
        return self.language_model

    @property
    def _data(self) -> TokenDataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TokenDataModule) else None

    @property
    def _start_fingerprint(self) -> str | None:
        """Of the visual tokenizer whose codes the model already knows."""
        return None if self.start_settings is None else self.start_settings.visual_tokenizer_fingerprint

    def grids(self, data: TokenDataModule) -> list[tuple[int, int]]:
        """Grids whose codes the model will see in sequences with the data's captions; after the data's setup."""
        return data.grids

    @cached_property
    def _adapter_record(self) -> dict[str, Any]:
        """What a state must say of the adapter whose weights it holds: its settings, and what they are added to."""
        if self.adapter is None:
            return {}
        assert self.start_directory is not None
        return {**asdict(self.adapter), "added_to": checkpoint_hash(self.start_directory)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the grid, so that a finished run that is started again can still export."""
        checkpoint["grid"] = self.grid
        if self.adapter is not None:
            checkpoint["adapter"] = self._adapter_record
            trained = trained_names(self)
            for key in checkpoint.keys() & MODEL_STATES:
                checkpoint[key] = {name: weight for name, weight in checkpoint[key].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the grid. Weights that an adapter's state leaves out stay as they were loaded."""
        saved, own = checkpoint.get("adapter") or {}, self._adapter_record
        if changed := [name for name in own or saved if saved.get(name) != own.get(name)]:
            differences = "; ".join(f"{name} {saved.get(name)} there, {own.get(name)} here" for name in changed)
            raise UserError(
                f"{self.trainer.ckpt_path} was trained with {'another' if saved else 'no'} adapter: {differences}. Use "
                "the configuration (model.init_args.adapter) and the checkpoint that it was trained with, or start a "
                "new training from its export (simplear export)."
            )
        if own:
            trained = trained_names(self)
            frozen = {name: weight for name, weight in self.state_dict().items() if name not in trained}
            for key in checkpoint.keys() & MODEL_STATES:
                checkpoint[key] = frozen | checkpoint[key]
        super().on_load_checkpoint(checkpoint)
        self.grid = checkpoint["grid"]

    @cached_property
    def visual_tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer at ``visual_tokenizer_path``, on CPU."""
        assert self.visual_tokenizer_path is not None
        with isolate_rng():  # its weights are drawn before they are loaded, at another moment on each rank
            return load_visual_tokenizer(self.visual_tokenizer_path)

    def checkpoint_settings(self) -> CheckpointSettings:
        """What ``simplear.json`` says of the model as trained here; the grid is the last training batch's."""
        if self.grid is None:
            raise RuntimeError(
                "no batch with images has been trained on yet, so the grid of the checkpoint is not known."
            )
        data, layout = self._data, self.language_model.layout
        if self.visual_tokenizer_path is not None:
            fingerprint: str | None = self.visual_tokenizer.fingerprint
        else:
            fingerprint = (data.fingerprint if data is not None else None) or self._start_fingerprint
        return CheckpointSettings(
            image_token_offset=layout.image_token_offset,
            codebook_size=layout.codebook_size,
            grid=self.grid,
            downsample=self.downsample,
            rope=self.language_model.rope,
            max_text_tokens=MAX_TEXT_TOKENS if data is None else data.max_text_tokens,
            generation=self.generation or GenerationDefaults(),
            visual_tokenizer=self.visual_tokenizer_path,
            visual_tokenizer_fingerprint=fingerprint,
        )

    @property
    def downsample(self) -> int:
        """Pixels a code: the named visual tokenizer's, else the token shards', else the starting checkpoint's."""
        if self.visual_tokenizer_path is not None:
            return self.visual_tokenizer.downsample
        if self._data is not None and self._data.downsample:
            return self._data.downsample
        return DEFAULT_DOWNSAMPLE if self.start_settings is None else self.start_settings.downsample
