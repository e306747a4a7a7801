"""Reads images from files, and converts them to inputs of a model."""

from __future__ import annotations

import base64
import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openneutron.core.files import access_refused
from openneutron.core.messages import did_you_mean, first_line
from openneutron.data.files import IMAGES
from openneutron.errors import InputError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["ImageTransform", "is_picture", "is_pixels", "open_image", "thumbnail"]

CHANNELS = {"rgb": 3, "bgr": 3, "grey": 1}
LAYOUTS = ("nchw", "nhwc")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
LARGEST_PIXEL = 255
# If the largest pixel is above this, a mean below 1 is an error: it belongs to pixels from 0 to 1.
LARGE_RANGE = 100
IMAGE_RANK = 4
# Numbers of channels of pixels: grey, RGB, RGB and alpha.
_COUNTS = (1, 3, 4)
# 8 times the pixels of a 4K image; about 270 MB of RGB. A file of a few kilobytes may declare more.
LARGEST_IMAGE = 2**26
# Modes of Pillow whose conversion to 8 bits clips values.
_WIDE_MODES = ("I", "F")
_SCALE_DOWN = "Scale the image down, or remove it from the data."


def open_image(path: Path) -> Image:
    """Returns the first image of a file, decoded.

    Raises `InputError`, which names the file, if it cannot be decoded, has more than 2^26 pixels, has more than 8 bits
    per channel, or Pillow is not installed.
    """
    module = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", module.DecompressionBombWarning)
            opened = module.open(path)  # reads the header only
        with opened as image:
            _check_pixels(path, image.width * image.height)
            image.load()
            found: Image = image
    except (MemoryError, KeyboardInterrupt, InputError):
        raise
    except PermissionError as error:
        raise access_refused(path, error) from error
    except module.DecompressionBombError as error:
        raise InputError(f"{path} has too many pixels: {first_line(error)}. {_SCALE_DOWN}") from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise InputError(
            f"{path} cannot be read as an image: {first_line(error)}. Save it again, or remove it from the data."
        ) from error
    if found.mode.startswith(_WIDE_MODES):
        raise InputError(
            f"{path} has more than 8 bits per pixel (Pillow's mode {found.mode}), whose range is not known. Convert it "
            "to 8 bits, or save its values as .npy."
        )
    return found


def _check_pixels(path: Path, pixels: int) -> None:
    if pixels > LARGEST_IMAGE:
        raise InputError(f"{path} has {pixels:,} pixels, more than {LARGEST_IMAGE:,}. {_SCALE_DOWN}")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("Reading images needs Pillow. Install it: pip install pillow.") from error
    return Image


def is_picture(value: Any) -> bool:
    """Whether `value` is an image of Pillow. Does not import Pillow."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def is_pixels(value: Any) -> bool:
    """Whether `value` is an array or tensor of uint8, [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels."""
    if str(getattr(value, "dtype", "")).removeprefix("torch.") != "uint8":
        return False
    shape = tuple(value.shape)
    return all(shape) and (len(shape) == 2 or (len(shape) == 3 and (shape[2] in _COUNTS or shape[0] in _COUNTS)))


def _of_pixels(value: Any) -> Image:
    import numpy as np

    array = np.asarray(value)
    if array.ndim == 3 and array.shape[2] not in _COUNTS:
        array = array.transpose(1, 2, 0)
    made: Image = _pillow().fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))
    return made


def thumbnail(source: Any, size: int = 64) -> str | None:
    """Returns an image as a `data:` URI of a JPEG of at most `size` x `size` pixels; None if it is not an image.

    `source` is a path, an image of Pillow, or pixels of uint8, such as the inputs of a `Sample` without a transform.
    Raises `InputError` as `open_image` does.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix.lower() not in IMAGES:
            return None
        picture = open_image(path)
    elif is_picture(source):
        picture = source
    elif is_pixels(source):
        picture = _of_pixels(source)
    else:
        return None
    picture = picture.convert("RGB")
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class ImageTransform:
    """Converts an image to a float tensor [C, H, W], as torchvision's transforms for evaluation do.

    The steps, in this order:

    1. `channels`: "rgb", "bgr" or "grey" (the luma of ITU-R 601-2, as Pillow's mode "L").
    2. `resize`: a number resizes the shorter side to it and keeps the proportions; a pair (height, width) does not keep
       them. `interpolation` is bilinear by default, with antialiasing.
    3. `crop`: the centre, a number for a square or a pair (height, width). Where the image is smaller than the crop, it
       is padded with zeros.
    4. `scale`: factor of the pixels, which are integers from 0 to 255. 1/255 by default.
    5. `mean` and `std`, in the units of the scaled pixels: (pixel x scale - mean) / std. One number for all channels,
       or one for each channel, in the order of `channels`.
    6. `layout`: "nchw" returns [C, H, W], "nhwc" returns [H, W, C].

    `channels`, `layout` and the size are None by default: `fitted` takes them from the model. The object can be pickled
    and compared. A call takes an image of Pillow, or an array or tensor of uint8: [H, W], [H, W, C] or [C, H, W].

    Raises `OptionError` for values that are out of range or ambiguous: a `mean` above the largest scaled pixel (123.7
    with a scale of 1/255), and a `mean` and `std` below 1 if pixels are not scaled to 0..1.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    scale: float = 1 / LARGEST_PIXEL
    resize: int | Sequence[int] | None = None
    crop: int | Sequence[int] | None = None
    channels: str | None = None
    layout: str | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, known in (("channels", CHANNELS), ("layout", LAYOUTS), ("interpolation", INTERPOLATIONS)):
            value = getattr(self, name)
            if value not in known and not (value is None and name != "interpolation"):
                raise OptionError(
                    f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(str(value), known)}"
                )
        if not _is_number(self.scale) or self.scale <= 0:
            raise OptionError(f"scale must be a positive number, such as 1/255, not {self.scale!r}.")
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _checked_size(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _checked_numbers(name, getattr(self, name), self.channels))
        self._check_range()

    def _check_range(self) -> None:
        means, deviations = _as_tuple(self.mean), _as_tuple(self.std)
        if any(value <= 0 for value in deviations):
            raise OptionError(f"std must be positive, not {self.std}.")
        largest = LARGEST_PIXEL * self.scale
        for name, values in (("mean", means), ("std", deviations)):
            above = [value for value in values if value > largest * (1 + 1e-9)]
            if above:
                raise OptionError(
                    f"{name} has the value {above[0]:g}, but it is in the units of pixels after scaling, which are "
                    f"0..{largest:g}. Divide {name} by {1 / self.scale:g}, or give scale=1 for pixels of 0..255."
                )
        if largest > LARGE_RANGE and means and deviations and all(0 <= value < 1 for value in (*means, *deviations)):
            raise OptionError(
                f"mean={self.mean} and std={self.std} are for pixels of 0..1, but scale={self.scale:g} makes them "
                f"0..{largest:g}. Leave out scale, or give mean and std for 0..{largest:g}."
            )

    def fitted(self, sizes: Sequence[int | None]) -> ImageTransform:
        """Returns the transform with channels, layout and size of a model's input: [N, C, H, W] or [N, H, W, C].

        Without `resize` and `crop`, images are resized to the model's height and width. With a number for `resize` and
        no `crop`, the centre is cropped to that size.

        Raises `InputError` for an input that is not an image of 1 or 3 channels, and `OptionError` if the transform
        makes images of another size or with another number of channels, or pads them.
        """
        layout, count, size = self._of_model(sizes)
        channels = self.channels or ("grey" if count == 1 else "rgb")
        if CHANNELS[channels] != count:
            raise OptionError(
                f"channels='{channels}' makes images of {CHANNELS[channels]} channels, but the model takes {count}. "
                "Leave channels out."
            )
        resize, crop = self.resize, self.crop
        if resize is None and crop is None:
            resize = size
        elif isinstance(resize, int) and crop is None:
            crop = size
        made = replace(self, channels=channels, layout=layout, resize=resize, crop=crop)
        made._check_makes(size)
        return made

    def _of_model(self, sizes: Sequence[int | None]) -> tuple[str, int, tuple[int, int]]:
        """Returns the layout, the number of channels, and the height and width of a model's input."""
        for layout, (c, h, w) in (("nchw", (1, 2, 3)), ("nhwc", (3, 1, 2))):
            if len(sizes) != IMAGE_RANK or self.layout not in (None, layout):
                continue
            count, height, width = sizes[c], sizes[h], sizes[w]
            if count in (1, 3) and height is not None and width is not None:
                return layout, count, (height, width)
        shape = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(
            f"The model's input ({shape}) is not an image of 1 or 3 channels. Give a transform that converts images to "
            "it."
        )

    def _check_makes(self, size: tuple[int, int]) -> None:
        wanted = f"the model takes {size[0]} x {size[1]}"
        crop = _pair(self.crop) if self.crop is not None else None
        if crop is not None and crop != size:
            raise OptionError(
                f"crop={self.crop} makes images of {crop[0]} x {crop[1]} pixels, but {wanted}. Leave crop out, or give "
                "that size."
            )
        if crop is None and not isinstance(self.resize, int) and self.resize != size:
            raise OptionError(
                f"resize={self.resize} makes images of another size, but {wanted}. Leave resize out, or give that size."
            )
        if crop is None or self.resize is None:
            return
        # A number for resize is the shorter side, which may be the height or the width.
        resized = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if resized[0] < crop[0] or resized[1] < crop[1]:
            raise OptionError(
                f"resize={self.resize} makes images smaller than the crop of {crop[0]} x {crop[1]}. Give a larger "
                "resize or a smaller crop."
            )

    def __call__(self, image: Any) -> Tensor:
        """Returns a float32 tensor [C, H, W], or [H, W, C] for the layout "nhwc"."""
        import numpy as np
        import torch

        channels = self.channels or "rgb"
        picture = self._picture(image).convert("L" if channels == "grey" else "RGB")
        picture = self._cropped(self._resized(picture))
        pixels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, CHANNELS[channels])
        if channels == "bgr":
            pixels = pixels.flip(2)
        values = pixels.float() / (1 / self.scale)
        if self.mean is not None:
            values = values - torch.tensor(self.mean, dtype=torch.float32)
        if self.std is not None:
            values = values / torch.tensor(self.std, dtype=torch.float32)
        return values.contiguous() if self.layout == "nhwc" else values.permute(2, 0, 1).contiguous()

    def _picture(self, image: Any) -> Image:
        if is_picture(image):
            found: Image = image
            return found
        if is_pixels(image):
            return _of_pixels(image)
        shape = f" of {image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise InputError(
            "ImageTransform takes an image of Pillow, or uint8 pixels of shape [H, W], [H, W, C] or [C, H, W] with 1, "
            f"3 or 4 channels, not {type(image).__name__}{shape}. For data that are transformed already, leave out the "
            "options of images. A folder of a build stores the options of the build; give its model.pte to use none."
        )

    def _resized(self, picture: Image) -> Image:
        if self.resize is None:
            return picture
        if isinstance(self.resize, int):
            short, long = sorted(picture.size)
            # torchvision truncates the longer side.
            size = (self.resize, int(self.resize * long / short))
            width, height = size if picture.width <= picture.height else size[::-1]
        else:
            height, width = self.resize
        if picture.size == (width, height):
            return picture
        method = getattr(_pillow().Resampling, self.interpolation.upper())
        return picture.resize((width, height), method)

    def _cropped(self, picture: Image) -> Image:
        if self.crop is None:
            return picture
        height, width = _pair(self.crop)
        above, beside = max(height - picture.height, 0), max(width - picture.width, 0)
        if above or beside:
            from PIL import ImageOps

            borders = (beside // 2, above // 2, (beside + 1) // 2, (above + 1) // 2)
            picture = ImageOps.expand(picture, borders)
        top, left = round((picture.height - height) / 2), round((picture.width - width) / 2)
        return picture.crop((left, top, left + width, top + height))


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _as_tuple(value: Any) -> tuple[float, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _checked_size(name: str, size: Any) -> int | tuple[int, int] | None:
    if size is None:
        return None
    values = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
    if len(values) not in (1, 2) or not all(_is_number(one) and int(one) == one and one > 0 for one in values):
        raise OptionError(f"{name} must be a positive integer or a pair (height, width), not {size!r}.")
    pixels = [int(one) for one in values]
    return pixels[0] if len(pixels) == 1 else (pixels[0], pixels[1])


def _checked_numbers(name: str, value: Any, channels: str | None) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    if _is_number(value):
        return float(value)
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not values or not all(map(_is_number, values)):
        raise OptionError(f"{name} must be a number, or one number for each channel, not {value!r}.")
    counts = {CHANNELS[channels]} if channels else set(CHANNELS.values())
    if len(values) == 1:
        return float(values[0])
    if len(values) not in counts:
        raise OptionError(
            f"{name} has {len(values)} numbers, but images have {' or '.join(map(str, sorted(counts)))} channels. Give "
            "one number for each channel."
        )
    return tuple(map(float, values))
