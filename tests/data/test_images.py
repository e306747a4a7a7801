"""Reading images from files, and their transforms."""

from __future__ import annotations

import pickle
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openneutron.data import ImageTransform, read_value
from openneutron.errors import InputError, OptionError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_pixels_are_scaled_then_normalized() -> None:
    image = picture()
    expected = (pixels_of(image) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(ImageTransform(MEAN, STD)(image), expected)
    assert torch.equal(ImageTransform()(image), pixels_of(image) / 255)
    assert torch.allclose(ImageTransform(mean=1, scale=1 / 127.5)(image), pixels_of(image) / 127.5 - 1)
    assert torch.equal(ImageTransform(mean=(123.7, 116, 104), scale=1)(image)[1], pixels_of(image)[1] - 116)


def test_channels_and_layout() -> None:
    image = picture()
    assert torch.equal(ImageTransform(channels="bgr")(image), ImageTransform()(image).flip(0))
    # One mean for each channel, in the order of the channels.
    bgr = ImageTransform(MEAN, channels="bgr")(image)
    assert torch.allclose(bgr[2] + MEAN[2], ImageTransform()(image)[0])
    grey = ImageTransform(channels="grey")(image)
    assert torch.equal(grey[0], torch.from_numpy(np.array(image.convert("L"))).float() / 255)
    assert torch.equal(ImageTransform(layout="nhwc")(image), ImageTransform()(image).permute(1, 2, 0))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (20, 61)])
@pytest.mark.parametrize(("resize", "crop"), [(24, 20), (24, (16, 20)), (None, 16), (None, (50, 70)), ((20, 28), None)])
def test_sizes_equal_torchvision(size: tuple[int, int], resize: Any, crop: Any) -> None:
    """The expected sizes and offsets follow the documentation of torchvision's Resize and CenterCrop."""
    image = picture(*size)
    found = ImageTransform(resize=resize, crop=crop)(image)
    resized = image
    if isinstance(resize, int):
        short, long = min(size), max(size)
        pair = (resize, int(resize * long / short))
        resized = image.resize(pair if size[0] <= size[1] else pair[::-1], Image.Resampling.BILINEAR)
    elif resize is not None:
        resized = image.resize(resize[::-1], Image.Resampling.BILINEAR)
    if crop is None:
        assert torch.equal(found, pixels_of(resized) / 255)
        return
    height, width = (crop, crop) if isinstance(crop, int) else crop
    assert found.shape == (3, height, width)
    inside = pixels_of(resized) / 255
    top, left = round((resized.height - height) / 2), round((resized.width - width) / 2)
    if top >= 0 and left >= 0:
        assert torch.equal(found, inside[:, top : top + height, left : left + width])
    elif top <= 0 and left <= 0:
        above, beside = (height - resized.height) // 2, (width - resized.width) // 2
        assert torch.equal(found[:, above : above + resized.height, beside : beside + resized.width], inside)
        assert float(found.sum()) == pytest.approx(float(inside.sum()), rel=1e-4)  # the rest is zero


def test_results_equal_torchvision() -> None:
    pytest.importorskip("torchvision_cpu_shim")
    transforms = pytest.importorskip("torchvision.transforms")
    for size in ((40, 30), (31, 57), (24, 24)):
        wanted = transforms.Compose([
            transforms.Resize(26), transforms.CenterCrop(24), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ])  # fmt: skip
        found = ImageTransform(MEAN, STD, resize=26, crop=24)(picture(*size))
        assert torch.allclose(found, wanted(picture(*size)), atol=1e-6)


def test_arrays_of_pixels() -> None:
    image = picture()
    array = np.array(image)
    for given in (array, torch.from_numpy(array), array.transpose(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(ImageTransform()(given), ImageTransform()(image))
    for grey in (array[..., 0], array[..., :1], array[None, ..., 0]):
        assert torch.equal(ImageTransform(channels="grey")(grey)[0] * 255, torch.from_numpy(array[..., 0]).float())
    for wrong in (array.astype(np.float32), array[None], array[..., :2], "text", 3):
        with pytest.raises(InputError, match="ImageTransform takes an image of Pillow, or uint8 pixels"):
            ImageTransform()(wrong)


@pytest.mark.parametrize(
    ("options", "sizes", "made"),
    [
        ({}, (1, 3, 8, 6), {"channels": "rgb", "layout": "nchw", "resize": (8, 6)}),
        ({}, (1, 1, 8, 6), {"channels": "grey", "layout": "nchw", "resize": (8, 6)}),
        ({}, (4, 8, 6, 3), {"channels": "rgb", "layout": "nhwc", "resize": (8, 6)}),
        ({"channels": "bgr"}, (None, 3, 8, 6), {"channels": "bgr", "layout": "nchw", "resize": (8, 6)}),
        ({"resize": 10}, (1, 3, 8, 6), {"channels": "rgb", "layout": "nchw", "resize": 10, "crop": (8, 6)}),
        ({"crop": 8}, (1, 3, 8, 8), {"channels": "rgb", "layout": "nchw", "crop": 8}),
        ({"mean": 0.5, "std": 0.5}, (1, 1, 8, 8), {"channels": "grey", "layout": "nchw", "resize": (8, 8), "mean": 0.5,
                                                 "std": 0.5}),
    ],
)  # fmt: skip
def test_accepted_inputs_of_a_model(options: dict[str, Any], sizes: tuple[int, ...], made: dict[str, Any]) -> None:
    assert ImageTransform(**options).fitted(sizes) == ImageTransform(**made)
    result = ImageTransform(**options).fitted(sizes)(picture())
    assert result.shape == sizes[1:]


@pytest.mark.parametrize(
    ("options", "sizes", "error", "message"),
    [
        ({"mean": MEAN}, (1, 1, 8, 8), OptionError, "mean has 3 numbers, but images have 1 channels"),
        ({"channels": "grey"}, (1, 3, 8, 8), OptionError, "makes images of 1 channels, but the model takes 3"),
        ({"channels": "rgb"}, (1, 1, 8, 8), OptionError, "makes images of 3 channels, but the model takes 1"),
        ({"crop": 6}, (1, 3, 8, 8), OptionError, "crop=6 makes images of 6 x 6 pixels, but the model takes 8 x 8"),
        ({"resize": (6, 8)}, (1, 3, 8, 8), OptionError, "makes images of another size"),
        ({"resize": 6}, (1, 3, 8, 8), OptionError, "resize=6 makes images smaller than the crop of 8 x 8"),
        ({}, (1, 2, 8, 8), InputError, r"The model's input \(1, 2, 8, 8\) is not an image of 1 or 3 channels"),
        ({}, (1, 3, None, 8), InputError, r"\(1, 3, any, 8\) is not an image"),
        ({}, (1, 16), InputError, r"\(1, 16\) is not an image"),
        ({"layout": "nhwc"}, (1, 3, 8, 8), InputError, "is not an image"),
    ],
)
def test_refused_inputs_of_a_model(options: Any, sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageTransform(**options).fitted(sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (123.7, 116.8, 103.9)}, r"mean has the value 123.7, .*0\.\.1\. Divide mean by 255, or give scale=1"),
        ({"std": (58.4, 57.1, 57.4)}, r"std has the value 58.4.* Divide std by 255"),
        ({"mean": MEAN, "std": STD, "scale": 1}, r"are for pixels of 0\.\.1, but scale=1 makes them 0\.\.255"),
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers, but images have 1 or 3 channels"),
        ({"mean": (0.5,) * 3, "channels": "grey"}, "mean has 3 numbers, but images have 1 channels"),
        ({"mean": "0.5"}, "mean must be a number, or one number for each channel, not '0.5'"),
        ({"mean": (0.5, "x", 0.5)}, "mean must be a number"),
        ({"mean": float("nan")}, "mean must be a number"),
        ({"mean": 10**400}, "mean must be a number"),
        ({"std": 0.0}, "std must be positive"),
        ({"std": (0.2, -0.2, 0.2)}, "std must be positive"),
        ({"scale": 0}, "scale must be a positive number"),
        ({"scale": "1/255"}, "scale must be a positive number"),
        ({"resize": 0}, "resize must be a positive integer or a pair"),
        ({"resize": (1, 2, 3)}, "resize must be a positive integer or a pair"),
        ({"crop": 2.5}, "crop must be a positive integer or a pair"),
        ({"channels": "gray"}, r"channels must be one of rgb, bgr, grey, not 'gray'\. Did you mean 'grey'\?"),
        ({"layout": "chw"}, "layout must be one of nchw, nhwc"),
        ({"interpolation": "cubic"}, "Did you mean 'bicubic'"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ImageTransform(**options)


def test_lists_are_taken_and_the_transform_can_be_pickled_and_compared() -> None:
    transform = ImageTransform([*MEAN], [*STD], resize=[8, 8])
    assert transform == ImageTransform(MEAN, STD, resize=(8, 8))
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert hash(transform) == hash(ImageTransform(MEAN, STD, resize=(8, 8)))
    assert ImageTransform([0.5]) == ImageTransform(0.5)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_files_of_many_modes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    assert ImageTransform()(read_value(path)).shape == (3, 30, 40)
    assert ImageTransform(channels="grey")(read_value(path)).shape == (1, 30, 40)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp"])
def test_the_first_of_several_images(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(path, save_all=True, append_images=[blue])
    assert ImageTransform()(read_value(path))[:, 4, 4].tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture(200, 200).save(path)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:200], whole[:-600], whole[:40] + b"\0" * 50 + whole[90:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"a\.png cannot be read as an image"):
            ImageTransform()(read_value(path))
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(path)
    with pytest.raises(InputError, match=r"a\.png has more than 8 bits per pixel \(Pillow's mode I;16\)"):
        read_value(path)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"a\.png has too many pixels: Image size .* exceeds limit"):
        read_value(path)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="pip install pillow"):
        read_value(path)


@pytest.mark.parametrize("size", [(8193, 8192), (16384, 16384)])
def test_small_files_of_huge_images_are_refused_before_they_are_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    """The header of a PNG is replaced: a file of some hundred bytes declares 67 or 268 million pixels."""
    path = tmp_path / "a.png"
    picture(8, 8).save(path)
    whole = bytearray(path.read_bytes())
    header = b"IHDR" + struct.pack(">II", *size) + bytes(whole[24:29])
    whole[12:33] = header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(bytes(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"{size[0] * size[1]:,}|{size[0] * size[1]}") as caught:
            read_value(path)
    assert "Scale the image down" in str(caught.value)
