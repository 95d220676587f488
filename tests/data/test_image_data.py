from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
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


def write_pictures(directory: Path, count: int) -> None:
    directory.mkdir(exist_ok=True)
    for number in range(count):
        Image.effect_noise((8, 8), 90).convert("RGB").save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(f"one {number}\ntwo {number}")


def test_a_broken_picture_is_left_out_with_a_count_when_cached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path, 5)
    (tmp_path / "3.png").write_bytes(b"broken")
    cached = ImageDataModule(ImageFolderSource(str(tmp_path)), 2, 8, 8)
    cached.setup("fit")
    assert len(list(cached.train_dataloader())) == 2 and "1 pictures dropped: not a picture" in caplog.text


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated or damaged picture": lambda d: (d / "3.png").write_bytes((d / "3.png").read_bytes()[:60]),
    "not a picture": lambda d: (d / "3.png").write_bytes(b"<html>"),
    "picture file missing": lambda d: (d / "3.png").unlink(),
    "no caption": lambda d: (d / "3.txt").write_text(""),
}


@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*")
@pytest.mark.parametrize("reason", DAMAGES)
def test_the_next_picture_takes_the_place_of_one_that_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    """The order and all other samples stay, also of a run that is resumed when the picture has broken; 7 steps of 2
    of 7 pictures are two epochs and one step.
    """
    write_pictures(tmp_path / "pictures", 7)

    def data() -> ImageDataModule:
        return ImageDataModule(sources[0], 2, 8, 8, cache=False)

    sources = [ImageFolderSource(str(tmp_path / "pictures"))]
    whole = fit(data(), tmp_path / "whole").seen
    DAMAGES[reason](tmp_path / "pictures")
    again = fit(data(), tmp_path / "again").seen
    broken = [("3.png" in keys) for keys, _, _ in whole]
    assert any(broken) and [row for row, has in zip(again, broken, strict=True) if not has] == [
        row for row, has in zip(whole, broken, strict=True) if not has
    ]
    for (before, _, _), (after, captions, _), has in zip(whole, again, broken, strict=True):
        if has:
            assert after == ["4.png" if key == "3.png" else key for key in before]
            assert all(caption.endswith(f" {key[0]}") for key, caption in zip(after, captions, strict=True))
    assert caplog.text.count(f"3.png cannot be used ({reason}): the next takes its place") == sum(broken)
    assert fit(data(), tmp_path / "resumed", tmp_path / "whole/step=2.ckpt").seen == again[2:]


def test_where_no_picture_can_be_used_that_is_said(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"x")
    data = ImageDataModule(ImageFolderSource(str(tmp_path)), 1, 8, 8, cache=False, shuffle=False)
    data.setup("fit")
    with pytest.raises(ValueError, match="none of the 3 samples can be used"):
        list(data.train_dataloader())


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
