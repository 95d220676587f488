from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from simplear.data import ImageDataModule, ImageFolderSource, ScenesSource, WebDatasetSource
from simplear.visual_tokenizer import to_pixels


class Recorder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[str], list[str], float]] = []

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen.append((batch["keys"], batch["captions"], float(batch["pixels"].sum())))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ImageDataModule, root: Path, resume: Path | None = None) -> Recorder:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=7,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    module = Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_holds_the_pictures_of_its_keys(cache: bool) -> None:
    source = ScenesSource(10, 16)
    data = ImageDataModule(source, 4, 16, 16, cache=cache, validation_source=ScenesSource(9, 16, split="validation"))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 2 and len({key for batch in batches for key in batch["keys"]}) == 8
    for batch in batches:
        assert batch["pixels"].shape == (4, 3, 16, 16) and batch["pixels"].dtype == torch.float32
        for key, caption, pixels in zip(batch["keys"], batch["captions"], batch["pixels"], strict=True):
            sample = source.sample(int(key.rpartition("-")[2]))
            assert caption in sample.captions
            np.testing.assert_array_equal(pixels.numpy(), to_pixels(np.asarray(sample.image)[None])[0])
    validation = [key for batch in data.val_dataloader() for key in batch["keys"]]
    assert validation == [f"validation-seed0-{number:09d}" for number in range(8)]


def test_cached_or_not_the_order_is_the_same() -> None:
    seen = []
    for cache in (True, False):
        data = ImageDataModule(ScenesSource(10, 16), 4, 8, 8, cache=cache, seed=3)
        data.setup("fit")
        seen.append([(batch["keys"], batch["captions"], batch["pixels"].sum()) for batch in data.train_dataloader()])
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*")
def test_a_resumed_run_sees_what_one_never_stopped_sees(tmp_path: Path) -> None:
    def data() -> ImageDataModule:
        return ImageDataModule(ScenesSource(14, 16), 4, 16, 16)

    whole = fit(data(), tmp_path / "whole").seen
    assert len({str(row) for row in whole}) == 7
    for stop in (2, 3, 4):
        assert fit(data(), tmp_path / f"from{stop}", tmp_path / f"whole/step={stop}.ckpt").seen == whole[stop:]


def test_a_broken_picture_is_counted_when_cached_and_named_when_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("x")
    (tmp_path / "3.png").write_bytes(b"broken")
    cached = ImageDataModule(ImageFolderSource(str(tmp_path)), 2, 8, 8)
    cached.setup("fit")
    assert len(list(cached.train_dataloader())) == 2 and "1 pictures dropped: not a picture" in caplog.text
    direct = ImageDataModule(ImageFolderSource(str(tmp_path)), 5, 8, 8, cache=False)
    direct.setup("fit")
    with pytest.raises(ValueError, match=r"sample 3 of .*: not a picture"):
        list(direct.train_dataloader())


def test_too_few_pictures_are_named_by_what_they_are_for() -> None:
    few, enough = ScenesSource(3, 8), ScenesSource(4, 8)
    data = ImageDataModule(enough, 4, 8, 8, validation_source=few)
    data.setup("fit")
    data.train_dataloader()
    with pytest.raises(ValueError, match=r"^3 validation rows .* fill no global batch of 4"):
        data.val_dataloader()
    data = ImageDataModule(few, 4, 8, 8)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^3 training rows"):
        data.train_dataloader()


def test_tars_need_the_cache(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.txt", b"x"), ("1.png", _png())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = WebDatasetSource(str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match=r"WebDatasetSource cannot be read in random order: set cache"):
        ImageDataModule(source, 1, 8, 8, cache=False).setup("fit")
    data = ImageDataModule(source, 1, 8, 8)
    data.setup("fit")
    assert [batch["keys"] for batch in data.train_dataloader()] == [["1"]]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
