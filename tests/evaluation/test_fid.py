"""FID against distances known in closed form and against scipy's matrix square root; Inception from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from simplear.evaluation.fid import FrechetDistance, InceptionFeatures

COUNT = 200


class Table(nn.Module):
    """Gives picture k, which says its number in its first pixel, row k of a table as features."""

    name = "table"

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.num_features = rows, rows.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images[:, 0, 0, 0].long()]


def numbered(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2)


def whitened(features: int, seed: int, count: int = COUNT) -> np.ndarray:
    """Random rows with mean 0 and unbiased covariance 1, but for rounding."""
    rows = np.random.default_rng(seed).normal(size=(count, features))
    rows -= rows.mean(axis=0)
    return rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T


def distance(real: np.ndarray, drawn: np.ndarray, batch: int = 64) -> float:
    measure = FrechetDistance(Table(torch.from_numpy(real)))
    for part in numbered(len(real)).split(batch):
        measure.update(part, real=True)
    measure.extractor.rows = torch.from_numpy(drawn)
    for part in numbered(len(drawn)).split(batch):
        measure.update(part, real=False)
    return measure.compute()


def by_matrix_root(real: np.ndarray, drawn: np.ndarray) -> float:
    first, second = np.cov(real.T), np.cov(drawn.T)
    root = scipy.linalg.sqrtm(first @ second).real
    return float(((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


def test_gaussians_with_equal_axes_have_a_closed_form() -> None:
    """Diagonal covariances: the squared differences of means and of standard deviations."""
    scales, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([1.0, 0.0, -2.0, 0.5])
    other = np.array([2.0, 2.0, 1.5, 0.1])
    found = distance(whitened(4, 0) * scales, whitened(4, 1) * other + shift)
    assert found == pytest.approx((shift**2).sum() + ((scales - other) ** 2).sum(), rel=1e-6)


def test_covariances_that_do_not_commute_as_by_the_matrix_root() -> None:
    random = np.random.default_rng(2)
    real, drawn = (whitened(6, seed) @ random.normal(size=(6, 6)) + random.normal(size=6) for seed in (3, 4))
    first, second = np.cov(real.T), np.cov(drawn.T)
    expected = by_matrix_root(real, drawn)
    assert distance(real, drawn) == pytest.approx(expected, rel=1e-5)
    # The product of the roots is no root of the product: the test would tell the two apart.
    roots = scipy.linalg.sqrtm(first).real @ scipy.linalg.sqrtm(second).real
    wrong = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(first + second - 2 * roots)
    assert abs(wrong - expected) > 0.01 * expected


def test_equal_sets_are_at_0_and_batches_do_not_matter() -> None:
    real, drawn = whitened(5, 5) + 100, whitened(5, 6) * 2
    assert distance(real, real) == pytest.approx(0, abs=1e-6)
    assert distance(real, drawn, batch=1) == pytest.approx(distance(real, drawn, batch=200), rel=1e-9)


def test_one_process_measures_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = whitened(3, 7), whitened(3, 8)
    alone = distance(real, drawn)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr("torch.distributed.barrier", lambda *_, **__: pytest.fail("it waits for others"))
    assert distance(real, drawn) == alone


def test_fewer_pictures_than_features_are_said(caplog: pytest.LogCaptureFixture) -> None:
    distance(whitened(4, 0), whitened(4, 1))
    assert not caplog.messages
    few = np.random.default_rng(0).normal(size=(5, 8))
    distance(few, few)
    assert "more features than pictures" in caplog.text
    with pytest.raises(ValueError, match="1 real and 0 drawn"):
        measure = FrechetDistance(Table(torch.zeros(1, 2)))
        measure.update(numbered(1), real=True)
        measure.compute()


def test_features_that_are_not_finite_are_refused() -> None:
    measure = FrechetDistance(Table(torch.full((2, 2), torch.nan)))
    for real in (True, False):
        measure.update(numbered(2), real)
    with pytest.raises(ValueError, match="not finite"):
        measure.compute()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


def test_inception_reads_a_file_and_takes_any_size(inception_file: Path) -> None:
    features = InceptionFeatures(str(inception_file))
    images = torch.randint(0, 256, (2, 3, 40, 64), dtype=torch.uint8)
    found = FrechetDistance(features).extractor(images)
    assert found.shape == (2, features.num_features) and not found.requires_grad
    assert torch.allclose(found[1:], features(images[1:]), atol=1e-5)


def test_files_that_are_no_inception_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pth, the weights"):
        InceptionFeatures(str(tmp_path / "missing.pth"))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights"):
        InceptionFeatures(str(tmp_path / "other.pth"))
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")  # code, which weights_only refuses
    with pytest.raises(ValueError, match=r"pickled\.pth does not hold the weights .*[Ww]eights.only"):
        InceptionFeatures(str(tmp_path / "pickled.pth"))

    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", refused)
    with pytest.raises(FileNotFoundError, match=r"no network.*https://github.*--extractor\.weights"):
        InceptionFeatures()
