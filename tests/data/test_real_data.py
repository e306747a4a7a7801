"""The readers on real images and features."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from openneutron.data import ImageTransform, read_data, thumbnail

pytestmark = pytest.mark.data


def test_a_list_of_images_with_names_of_classes(data_folder: Path) -> None:
    samples = read_data(
        data_folder / "imagenet_sample_eval.txt", labelled=True, labels=data_folder / "imagenet_synset_words.txt",
        transform=ImageTransform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).fitted((1, 3, 224, 224)),
    )  # fmt: skip
    assert (len(samples), len(samples.classes or ())) == (800, 1000)
    first = samples[0]
    assert (first.label, (samples.classes or ())[1]) == (1, "n01443537 goldfish, Carassius auratus")
    assert first.inputs.shape == (3, 224, 224)
    assert -2.2 < float(first.inputs.min()) < 0 < float(first.inputs.max()) < 2.7
    assert len(thumbnail(first.path) or "") < 10_000
    chosen = samples.limited(50)
    assert len({sample.label for sample in chosen}) == 50


def test_names_of_classes_in_a_folder(data_folder: Path, tmp_path: Path) -> None:
    """One folder for each of three classes, called by its synset, name or index."""
    for name, file in (
        ("n01440764", "0000_tench"),
        ("great_white_shark", "0002_great_white_shark"),
        ("15", "0015_robin"),
    ):
        (tmp_path / name).mkdir()
        found = next((data_folder / "imagenet_sample_224").glob(f"{file[:4]}*.jpg"))
        (tmp_path / name / "a.jpg").symlink_to(found)
    samples = read_data(tmp_path, labelled=True, labels=data_folder / "imagenet_synset_words.txt")
    assert sorted(samples.labels or ()) == [0, 2, 15]


def test_archives_of_pixels_and_of_features(data_folder: Path) -> None:
    images = read_data(data_folder / "cifar10_test_jpeg_2000.npz", labelled=True, limit=100)
    assert set(Counter(images.labels).values()) == {10}
    assert ImageTransform().fitted((1, 3, 32, 32))(images[0].inputs).shape == (3, 32, 32)
    features = read_data(data_folder / "mlperf_tiny" / "kws01.npz", labelled=True)
    assert (len(features), features[0].inputs.shape, features[0].inputs.dtype) == (1000, (49, 10), np.int8)
    spectra = read_data(
        data_folder / "mlperf_tiny" / "sww_calibration_samples.npz", labelled=True,
        transform=lambda x: torch.from_numpy(x[:, 0].T.astype(np.float32)),
    )  # fmt: skip
    assert (len(spectra), spectra[0].inputs.shape) == (45, (40, 30))
    assert isinstance(spectra[0].label, int)
