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
from transformers import PreTrainedTokenizerBase

from simplear.data import TokenDataModule
from simplear.errors import UserError
from simplear.language_model import (
    Adapter,
    Checkpoint,
    CheckpointSettings,
    GenerationDefaults,
    LanguageModel,
    NamedWeights,
    add_adapter,
    checkpoint_hash,
    load_checkpoint,
    stored_weights,
    trained_names,
)
from simplear.sequence import MAX_TEXT_TOKENS
from simplear.stages.activation_checkpointing import ActivationCheckpointing, checkpoint_activations, require_mode
from simplear.stages.compilation import compile_decoder_layers, require_compiler
from simplear.stages.optimized import OptimizedModule
from simplear.stages.sharding import fill_shards, refuse_fsdp1, shard_language_model
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""That autocast computes in, by the Trainer's precision."""
MODEL_STATES = {"state_dict", "current_model_state"}
"""Where states have weights; the second is that of Lightning's callbacks that average them."""
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
        adapter: train a LoRA adapter and leave all other weights as they are, in the dtype that is computed in. States
            hold the adapter alone; exports are the merged model.
        compile_layers: run the decoder layers under `torch.compile`; the first steps compile, which takes minutes.

    Raises:
        ValueError: another word for ``activation_checkpointing``, or ``compile_layers`` without a C++ compiler.
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
        require_mode(activation_checkpointing)
        if compile_layers:
            require_compiler()
        self.visual_tokenizer_path = visual_tokenizer
        self.generation = generation
        self.activation_checkpointing = activation_checkpointing
        self.packed = packed
        self.compile_layers = compile_layers
        self.adapter = adapter
        self.grid: tuple[int, int] | None = None
        self.start_fingerprint: str | None = None
        """Of the visual tokenizer whose codes the model already knows; None for a new model."""
        self.start_downsample: int | None = None
        """Of that visual tokenizer."""
        self.start_directory: Path | None = None
        """Of the checkpoint to go on from; None for a new model."""

    def load_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """The model to train and its text tokenizer, of ``checkpoint``; whole, on CPU, in float32."""
        loaded = self.load_checkpoint(self.checkpoint)
        return loaded.model, loaded.tokenizer

    def empty_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase, NamedWeights]:
        """The same on the meta device, and its decoder's weights one at a time, for FSDP2."""
        loaded = self.load_checkpoint(self.checkpoint, with_weights=False)
        return loaded.model, loaded.tokenizer, stored_weights(loaded.model.decoder, loaded.directory)

    def load_checkpoint(self, checkpoint: str, with_weights: bool = True) -> Checkpoint:
        """A checkpoint to go on from, in float32; its own settings hold where the configuration says nothing.

        Args:
            checkpoint: directory or hub id of a checkpoint of this project or one released with the paper.
            with_weights: False leaves the model on the meta device.
        """
        loaded = load_checkpoint(checkpoint, dtype=torch.float32, with_weights=with_weights)
        self.start_fingerprint = loaded.settings.visual_tokenizer_fingerprint
        self.start_downsample = loaded.settings.downsample
        self.start_directory = loaded.directory
        if self.generation is None:
            self.generation = loaded.settings.generation
        if self.visual_tokenizer_path is None and loaded.visual_tokenizer_path is not None:
            self.visual_tokenizer_path = str(loaded.visual_tokenizer_path)
        return loaded

    def configure_model(self) -> None:
        """Build the model, and shard it under FSDP2."""
        if hasattr(self, "language_model"):
            return
        if self._trainer is not None:
            refuse_fsdp1(self.trainer.strategy)
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None, "the strategy sets the mesh before configure_model."
            model, self.text_tokenizer, weights = self.empty_language_model()
            self._prepare(model)
            shard_language_model(model, self.device_mesh["data_parallel"], self.trainer.precision)
            fill_shards(model, weights, self.trainer.strategy.root_device)
            # FSDP2 keeps the buffers of its first gathering: made in inference mode, they could not be trained with.
            self.trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        else:
            model, self.text_tokenizer = self.load_language_model()
            if self.adapter is not None:
                add_adapter(model, self.adapter, self._frozen_dtype)
            self._prepare(model)
        self.language_model = model
        self.copy_model(model)

    def configure_callbacks(self) -> list[Callback]:
        """As every stage; raises UserError for an adapter under FSDP2."""
        if self.adapter is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "an adapter does not go with FSDP2, which shards weights of one dtype. Its gradients and optimizer are "
                "small: take DDP (--trainer.strategy ddp)."
            )
        return super().configure_callbacks()

    @property
    def _frozen_dtype(self) -> torch.dtype | None:
        """Of the weights beside an adapter; None: as they were loaded."""
        plugin = None if self._trainer is None else self.trainer.precision_plugin
        return COMPUTE_DTYPES.get(getattr(plugin, "precision", ""))

    def _prepare(self, model: LanguageModel) -> None:
        model.train()
        rank = None if self.adapter is None else self.adapter.r
        checkpoint_activations(model.decoder, self.activation_checkpointing, rank)
        if self.compile_layers:
            compile_decoder_layers(model.decoder)

    def copy_model(self, model: LanguageModel) -> None:
        """Take what copies a stage needs of the model, whole or sharded, before it is trained; none here."""

    def on_fit_start(self) -> None:
        """Check that data and model belong together, before the first step is paid for."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule):
            return
        if data.codebook_size != self.language_model.layout.codebook_size:
            raise UserError(
                f"the token shards have a codebook of {data.codebook_size} codes, the model one of "
                f"{self.language_model.layout.codebook_size}: tokenize with the checkpoint's visual tokenizer."
            )
        known = {"the checkpoint's visual tokenizer": self.start_fingerprint}
        if self.visual_tokenizer_path is not None:
            known[self.visual_tokenizer_path] = self.visual_tokenizer.fingerprint
        for name, fingerprint in known.items():
            if None not in (fingerprint, data.fingerprint) and fingerprint != data.fingerprint:
                raise UserError(
                    f"the token shards were made by visual tokenizer {str(data.fingerprint)[:12]}…, but {name} is "
                    f"{str(fingerprint)[:12]}…: tokenize again with that one, or name the one that made them "
                    "(--model.init_args.visual_tokenizer)."
                )
        if data.layout != self.language_model.layout:
            raise UserError(
                f"--data.tokenizer {data.tokenizer_path} gives {data.layout}, the model's text tokenizer "
                f"{self.language_model.layout}: name the same one for both."
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
            dtype = next(weight.dtype for weight in self.parameters() if not weight.requires_grad)
            start = {"dtype": str(dtype).removeprefix("torch."), "directory": str(self.start_directory)}
            checkpoint["adapter"] = {**self._adapter_record, **start}
            trained = trained_names(self)
            for key in checkpoint.keys() & MODEL_STATES:
                checkpoint[key] = {name: weight for name, weight in checkpoint[key].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the grid back, after what every stage checks; what an adapter's state leaves out is as it was loaded."""
        state, saved, own = self.trainer.ckpt_path, checkpoint.get("adapter") or {}, self._adapter_record
        if saved and not own:
            raise UserError(
                f"{state} holds an adapter, and this training has none: resume with model.init_args.adapter as it was, "
                "or start a new training from the merged checkpoint (simplear export)."
            )
        if own and not saved:
            raise UserError(
                f"{state} holds all weights, and this training an adapter: resume without model.init_args.adapter, or "
                "start a new training from its checkpoint (simplear export)."
            )
        if changed := [name for name in own if saved.get(name) != own[name]]:
            raise UserError(
                f"{state} holds another adapter: "
                + "; ".join(f"{name} {saved.get(name)} there, {own[name]} here" for name in changed)
                + ". Use the configuration and the checkpoint that it was trained with, or start a new training."
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
                "no batch has been seen yet that has images, so the grid of the checkpoint is not known."
            )
        data = getattr(self.trainer, "datamodule", None)
        layout = self.language_model.layout
        return CheckpointSettings(
            image_token_offset=layout.image_token_offset,
            codebook_size=layout.codebook_size,
            grid=self.grid,
            downsample=self.downsample,
            rope=self.language_model.rope,
            max_text_tokens=data.max_text_tokens if isinstance(data, TokenDataModule) else MAX_TEXT_TOKENS,
            generation=self.generation or GenerationDefaults(),
            visual_tokenizer=self.visual_tokenizer_path,
            visual_tokenizer_fingerprint=self._fingerprint,
        )

    @property
    def _fingerprint(self) -> str | None:
        if self.visual_tokenizer_path is not None:
            return self.visual_tokenizer.fingerprint
        data = getattr(self.trainer, "datamodule", None)
        return (data.fingerprint if isinstance(data, TokenDataModule) else None) or self.start_fingerprint

    @property
    def downsample(self) -> int:
        """Pixels a code: the named visual tokenizer's, else the token shards', else the starting checkpoint's."""
        if self.visual_tokenizer_path is not None:
            return self.visual_tokenizer.downsample
        data = getattr(self.trainer, "datamodule", None)
        shards = data.downsample if isinstance(data, TokenDataModule) else None
        return shards or self.start_downsample or DEFAULT_DOWNSAMPLE
