"""Files of samples for tests of the readers."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from openneutron.data import Samples


def image(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def names(samples: Samples, folder: Path) -> list[str]:
    return [sample.path.relative_to(folder).as_posix() for sample in samples if sample.path is not None]


def labelled_folder(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            image(folder / name / f"{index}.png", 10 * index)
    return folder
