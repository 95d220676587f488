"""CLIP rewards against open_clip itself: its PIL preprocessing, its encoders, the cosine taken by hand."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.toys import ARCHITECTURE, pictures, random_weights
from simplear.rewards import CLIPReward, HPSv2Reward, load_clip, preprocess, save_clip, score

CAPTIONS = ["a red circle", "two blue squares", "a red circle", "a photo of a cat", ""]
NOTHING: list[dict[str, Any]] = [{}] * len(CAPTIONS)
PIL_ROUNDING = 2 / 255
"""PIL rounds to 8 bits after resizing each axis."""


def by_hand(name: str, file: str, images: list[Image.Image], captions: list[str], **changes: Any) -> Tensor:
    network, transform = open_clip.create_model_from_pretrained(name, file, **changes)
    network.eval()
    with torch.no_grad():
        image = network.encode_image(torch.stack([transform(picture) for picture in images]))
        text = network.encode_text(open_clip.get_tokenizer(name)(captions))
    return F.cosine_similarity(image, text)


@pytest.mark.parametrize(("height", "width", "tolerance"), [(32, 32, 1e-6), (64, 64, 2e-3), (20, 27, 2e-3)])
def test_scores_are_open_clips_cosine(tiny_clip: tuple[str, Path], height: int, width: int, tolerance: float) -> None:
    name, file = tiny_clip
    images, tensors = pictures(len(CAPTIONS), height, width)
    scores = CLIPReward(name, str(file), batch_size=2)(tensors, CAPTIONS, NOTHING)
    expected = by_hand(name, str(file), images, CAPTIONS)
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)
    assert scores.dtype == torch.float32
    # The comparison can fail: other captions score otherwise by far more.
    assert (expected - by_hand(name, str(file), images, CAPTIONS[::-1])).abs().max() > 10 * tolerance


SIZES = [(32, 32), (24, 40), (40, 24)]
CASES = [(mode, size, "bicubic") for mode in ("shortest", "longest", "squash") for size in SIZES]
# Of a model that is not square, open_clip resizes the shorter side bicubically whatever it is told.
CASES += [("shortest", (32, 32), "bilinear"), ("longest", (24, 40), "bilinear"), ("squash", (40, 24), "bilinear")]


@pytest.mark.parametrize(("mode", "size", "interpolation"), CASES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (90, 61), (61, 90), (20, 33)])
def test_preprocessing_is_open_clips_on_tensors(
    mode: str, size: tuple[int, int], interpolation: str, height: int, width: int
) -> None:
    settings = PreprocessCfg(size=size, resize_mode=mode, interpolation=interpolation, fill_color=0)
    images, tensors = pictures(2, height, width)
    expected = torch.stack([image_transform_v2(settings, is_train=False)(image) for image in images])
    found = preprocess(tensors, settings)
    assert found.shape == expected.shape == (2, 3, *size)
    deviation = torch.tensor(settings.std).view(3, 1, 1)
    assert ((found - expected) * deviation).abs().max() <= PIL_ROUNDING


def test_resizing_without_antialiasing_would_not_pass() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    settings = PreprocessCfg(size=32)
    expected = image_transform_v2(settings, is_train=False)(Image.fromarray(noise))
    tensors = torch.from_numpy(noise).permute(2, 0, 1)[None].float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    aliased = (F.interpolate(tensors, (32, 32), mode="bicubic").clamp(0, 1) - mean) / deviation
    assert ((preprocess(tensors, settings)[0] - expected) * deviation).abs().max() <= PIL_ROUNDING
    assert ((aliased[0] - expected) * deviation).abs().max() > 0.2


def count_texts(reward: CLIPReward) -> list[int]:
    """Appends the size of each batch of texts that the network encodes."""
    sizes: list[int] = []
    encode = reward.clip.network.encode_text

    def counted(ids: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(ids))
        return encode(ids, *rest)

    reward.clip.network.encode_text = counted
    return sizes


def test_a_captions_features_are_computed_once(tiny_clip: tuple[str, Path]) -> None:
    reward = CLIPReward(tiny_clip[0], str(tiny_clip[1]))
    sizes = count_texts(reward)
    _, images = pictures(5, 32, 32)
    first = reward(images, CAPTIONS, NOTHING)
    assert len(sizes) == 4
    assert torch.equal(reward(images, CAPTIONS, NOTHING), first) and len(sizes) == 4


def test_scores_do_not_depend_on_which_captions_came_before(tiny_clip: tuple[str, Path]) -> None:
    """Bit for bit: a training that is resumed has an empty cache."""
    _, images = pictures(5, 32, 32)
    fresh = CLIPReward(tiny_clip[0], str(tiny_clip[1]))(images, CAPTIONS, NOTHING)
    used = CLIPReward(tiny_clip[0], str(tiny_clip[1]))
    used(images, CAPTIONS[::-1], NOTHING)
    assert torch.equal(used(images, CAPTIONS, NOTHING), fresh)


def test_no_gradient_and_no_mixed_precision_reach_the_reward(tiny_clip: tuple[str, Path]) -> None:
    reward = CLIPReward(tiny_clip[0], str(tiny_clip[1]))
    _, images = pictures(5, 32, 32)
    plain = reward(images, CAPTIONS, NOTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = reward(images.requires_grad_(), CAPTIONS, NOTHING)
    assert torch.equal(plain, mixed) and not mixed.requires_grad
    low = CLIPReward(tiny_clip[0], str(tiny_clip[1]), precision="pure_bf16")(images, CAPTIONS, NOTHING)
    assert low.dtype == torch.float32 and 0 < (low - plain).abs().max() < 0.05


def test_the_network_is_no_part_of_what_holds_it(tiny_clip: tuple[str, Path]) -> None:
    module = nn.Module()
    module.reward = CLIPReward(tiny_clip[0], str(tiny_clip[1])).to("cpu")
    assert not module.state_dict() and not list(module.modules())[1:]
    assert not any(parameter.requires_grad for parameter in module.reward.clip.network.parameters())
    assert not module.reward.clip.network.training


def test_a_saved_directory_is_open_clips_and_scores_the_same(tiny_clip: tuple[str, Path], tmp_path: Path) -> None:
    name, file = tiny_clip
    loaded = load_clip(name, str(file))
    loaded.network.visual.preprocess_cfg["mean"] = (0.5, 0.4, 0.3)
    save_clip(loaded.network, ARCHITECTURE, loaded.tokenizer, tmp_path / "saved")
    network, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'saved'}")
    weights = random_weights()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert transform.transforms[-1].mean == [0.5, 0.4, 0.3]
    _, images = pictures(5, 40, 32)
    scores = CLIPReward(str(tmp_path / "saved"))(images, CAPTIONS, NOTHING)
    assert torch.equal(scores, CLIPReward(f"local-dir:{tmp_path / 'saved'}")(images, CAPTIONS, NOTHING))
    assert not torch.equal(scores, CLIPReward(name, str(file))(images, CAPTIONS, NOTHING))
    # Writing it again replaces it, and nothing is left beside it.
    save_clip(loaded.network, ARCHITECTURE, loaded.tokenizer, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_long_captions_are_counted_and_said(tiny_clip: tuple[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    reward = CLIPReward(tiny_clip[0], str(tiny_clip[1]))
    _, images = pictures(3, 32, 32)
    fits = " ".join(["red"] * 14)
    with caplog.at_level(logging.WARNING):
        reward(images, [fits, f"{fits} red", f"{fits} blue"], [{}] * 3)
        reward(images, [fits, f"{fits} red", f"{fits} green"], [{}] * 3)
    assert reward.captions_cut == 3
    assert [record.message.count("captions were cut") for record in caplog.records] == [1, 1]


def refused(match: str, *arguments: Any) -> None:
    with pytest.raises(ValueError, match=match):
        CLIPReward(*arguments).to("cpu")


def test_missing_and_mistaken_weights_are_named(tiny_clip: tuple[str, Path], tmp_path: Path) -> None:
    name, file = tiny_clip
    refused(f"{tmp_path}.*open_clip_config.json", str(tmp_path))
    refused("absent.*open_clip_config.json", "local-dir:absent")
    refused("'ViTH-14' not found in built-ins.*open_clip.list_models", "ViTH-14", "openai")
    refused("ViT-H-14 could not be loaded.*required.*open_clip.list_pretrained", "ViT-H-14")
    refused("tiny-test-clip with absent.pt could not be loaded.*not a known tag", name, "absent.pt")
    save_clip(load_clip(name, str(file)).network, ARCHITECTURE, None, tmp_path / "saved")
    refused("leave pretrained 'x' out", str(tmp_path / "saved"), "x")
    (tmp_path / "saved" / "open_clip_model.safetensors").unlink()
    refused("saved could not be loaded.*Required", str(tmp_path / "saved"))


def test_damaged_and_foreign_weights_are_named(tiny_clip: tuple[str, Path], tmp_path: Path) -> None:
    name, file = tiny_clip
    cut = tmp_path / "cut.pt"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused("cut.pt could not be loaded", name, str(cut))
    weights = random_weights()
    torch.save({key: value for key, value in weights.items() if key != "visual.proj"}, tmp_path / "less.pt")
    refused("less.pt could not be loaded", name, str(tmp_path / "less.pt"))


class Code:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Code, "ran", True)


def test_weights_run_no_code(tiny_clip: tuple[str, Path], tmp_path: Path) -> None:
    torch.save({"state_dict": random_weights(), "more": Code()}, tmp_path / "code.pt")
    refused("code.pt could not be loaded", tiny_clip[0], str(tmp_path / "code.pt"))
    assert not Code.ran


def test_downloads_that_fail_say_what_to_do(
    tiny_clip: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*arguments: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", offline)
    refused("laion2b_s32b_b79k could not be loaded.*no network.*download", "ViT-H-14", "laion2b_s32b_b79k")
    refused("hf-hub:someone/clip could not be loaded.*no network", "hf-hub:someone/clip")
    with pytest.raises(ValueError, match=r"xswu/HPSv2/HPS_v2\.1_compressed\.pt could not be loaded.*download"):
        HPSv2Reward().to("cpu")


def test_weights_come_from_the_hub_by_repository_and_file(
    tiny_clip: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tiny_clip[1])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    CLIPReward(tiny_clip[0], "hf-hub:someone/weights/sub/file.pt").to("cpu")
    assert asked == [("someone/weights", "sub/file.pt")]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48), (48, 24)])
def test_hps_pads_to_a_square_and_reads_the_authors_layout(
    tiny_clip: tuple[str, Path], tmp_path: Path, height: int, width: int
) -> None:
    """Its weights lie under ``state_dict``; its pictures are resized on their longer side and padded with black."""
    torch.save({"epoch": 1, "name": "hps", "state_dict": random_weights(1)}, tmp_path / "HPS.pt")
    torch.save(random_weights(1), tmp_path / "plain.pt")
    images, tensors = pictures(5, height, width)
    scores = HPSv2Reward(str(tmp_path / "HPS.pt"), tiny_clip[0])(tensors, CAPTIONS, NOTHING)
    expected = by_hand(tiny_clip[0], str(tmp_path / "plain.pt"), images, CAPTIONS, image_resize_mode="longest")
    torch.testing.assert_close(scores, expected, atol=2e-3, rtol=0)
    cut = CLIPReward(tiny_clip[0], str(tmp_path / "plain.pt"))(tensors, CAPTIONS, NOTHING)
    assert (cut - scores).abs().max() < 1e-6 if height == width else (cut - scores).abs().max() > 0.02


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_scores_are_float32_in_every_precision(tiny_clip: tuple[str, Path], precision: str) -> None:
    """As a training step asks for them, under autocast or with another default dtype."""
    images = pictures(len(CAPTIONS), 32, 32)[1]
    expected = CLIPReward(tiny_clip[0], str(tiny_clip[1]))(images, CAPTIONS, NOTHING)
    plugin = {"32-true": Precision, "bf16-mixed": partial(MixedPrecision, "bf16-mixed", "cpu")}.get(precision)
    precise = HalfPrecision("bf16-true") if plugin is None else plugin()
    reward = CLIPReward(tiny_clip[0], str(tiny_clip[1]))
    with precise.forward_context():
        found = score(reward, images, CAPTIONS, NOTHING)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02 if precision == "bf16-mixed" else 1e-5, rtol=0)
