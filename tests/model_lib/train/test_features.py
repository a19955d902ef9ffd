"""The cache of the vision tower's results: the same numbers, computed once, refused where there is no room."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model_lib import UserError
from model_lib.data.shards import SplitReader, read_manifest
from model_lib.train.config import TrainConfig
from model_lib.train.features import FeatureCache
from model_lib.train.training import train
from tests.conftest import small_model


def reader(data: Path) -> SplitReader:
    return SplitReader(read_manifest(str(data)), "train", size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_tower_says(data: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, pictures = small_model(), reader(data)
    model.freeze_into(dtype)
    cache = FeatureCache(str(tmp_path), model, pictures, "fingerprint", batch_size=7)
    numbers = np.array([5, 0, 63])
    (batch,) = pictures.batches([numbers])
    with torch.no_grad():
        features = model.encode(torch.from_numpy(batch.pixels))
    got = cache.read(numbers)
    assert got.dtype == dtype and got.shape == (3, 17, 24)
    torch.testing.assert_close(got, features, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_it_is_computed_once_for_a_tower_and_its_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, filled = small_model(), []
    fill = FeatureCache._fill
    monkeypatch.setattr(FeatureCache, "_fill", lambda self, *rest: filled.append(self.file) or fill(self, *rest))
    for _ in range(2):
        FeatureCache(str(tmp_path), model, reader(data), "fingerprint", batch_size=32)
    assert len(filled) == 1
    next(iter(tmp_path.glob("*.json"))).unlink()  # as if killed in the middle
    FeatureCache(str(tmp_path), model, reader(data), "fingerprint", batch_size=32)
    FeatureCache(str(tmp_path), model, reader(data), "other", batch_size=32)
    FeatureCache(str(tmp_path), small_model(seed=1), reader(data), "fingerprint", batch_size=32)
    assert len(filled) == 4 and len(set(filled)) == 3


def test_its_need_is_said_and_refused_where_there_is_no_room(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FeatureCache(str(tmp_path), small_model(), reader(data), "fingerprint", batch_size=32)
    assert "needs 0.0 GB" in caplog.text
    pictures = reader(data)
    pictures.rows = 10**12
    with pytest.raises(UserError, match=r"the feature cache needs 1632000\.0 GB and .* are free"):
        FeatureCache(str(tmp_path), small_model(), pictures, "fingerprint", batch_size=32)


def test_training_from_it_is_training_from_the_pictures(data: Path, tmp_path: Path, parts: tuple[Path, Path]) -> None:
    common = {"data": str(data), "vision": str(parts[0]), "decoder": str(parts[1]), "precision": "float32"}
    common |= {"epochs": 1, "batch_size": 16, "augment": "no", "dropout": 0.0, "ema": 0.0, "max_tokens": 20}
    plain = train(TrainConfig(output=str(tmp_path / "plain"), **common))
    cached = train(TrainConfig(output=str(tmp_path / "cached"), feature_cache=str(tmp_path / "cache"), **common))
    assert cached.validation_loss == pytest.approx(plain.validation_loss, rel=1e-5)


def test_it_is_refused_where_views_change_or_the_tower_is_trained() -> None:
    with pytest.raises(UserError, match="feature_cache: keeps one view of each picture; give --augment no too"):
        TrainConfig(data="data", output="out", feature_cache="cache")
    with pytest.raises(UserError, match=r"feature_cache gs://bucket: is not a local folder"):
        TrainConfig(data="data", output="out", augment="no", feature_cache="gs://bucket")
    with pytest.raises(UserError, match="feature_cache: preset tiny trains its vision tower"):
        TrainConfig(data="data", output="out", preset="tiny", feature_cache="cache")
