"""Files, folders, tables and functions as data."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.test_audio import write as write_wave
from tests.data_files import image, labelled_folder, names, text

from openneutron.data import ImageTransform, SkippedFilesWarning, check_data, inputs_of_files, read_data, read_labels
from openneutron.data.arrays import read_array
from openneutron.data.sources import FileSource, read_one_of, read_value
from openneutron.errors import InputError, OptionError
from openneutron.runtime.program import TensorInfo

# ------------------------------------------------------------------------------------------------------------- folders


def test_files_of_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/2.png", "a/1.JPG", "c.png"):
        image(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = read_data(tmp_path)
    assert names(samples, tmp_path) == ["a/1.JPG", "a/2.png", "b.png", "c.png"]
    assert [len(samples), samples[1].name, samples[-1].path] == [4, str(tmp_path / "a/2.png"), tmp_path / "c.png"]
    assert names(samples, tmp_path) == names(samples, tmp_path)
    assert names(samples[1:3], tmp_path) == ["a/2.png", "b.png"]
    assert all(sample.label is None for sample in samples)
    assert samples.paths == tuple(tmp_path / name for name in ("a/1.JPG", "a/2.png", "b.png", "c.png"))


def test_files_without_data_are_counted_and_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    for name in ("notes.txt", "clip.mov", "clip2.mov", "README"):
        (tmp_path / name).touch()
    message = r"4 files in '.*' have no data and are left out \(2 \.mov, 1 no suffix, 1 \.txt\): README, clip\.mov"
    with pytest.warns(SkippedFilesWarning, match=message):
        samples = read_data(tmp_path)
    assert [path.name for path in samples.skipped] == ["README", "clip.mov", "clip2.mov", "notes.txt"]
    assert len(samples) == 1


def test_files_of_the_operating_system_are_ignored(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "._a.png"):
        (tmp_path / name).touch()
    for name in (".cache", "__MACOSX"):
        image(tmp_path / name / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(read_data(tmp_path), tmp_path) == ["a.png"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    image(tmp_path / "real" / "a.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "real" / "back")
    assert names(read_data(tmp_path / "data"), tmp_path) == ["data/link/a.png"]


@pytest.mark.parametrize("labelled", [False, True])
def test_folders_without_data(labelled: bool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file of a known type \(.*\)\. It is empty"):
        read_data(tmp_path, labelled=labelled)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"has no file of a known type \(.*\)\. It has 1 other files: notes\.txt"):
        read_data(tmp_path, labelled=labelled)
    with pytest.raises(InputError, match=r"'.*nowhere' does not exist\. Data are a folder"):
        read_data(tmp_path / "nowhere", labelled=labelled)
    with pytest.raises(InputError, match=r"nowhere' does not exist"):
        check_data(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"It has 1 other files: notes\.txt"):
        check_data(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "row.csv", "class/a.npy", "link/a.wav"])
def test_the_early_check_of_a_folder_ends_at_the_first_sample(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "data", tmp_path / "data" / name
    folder.mkdir()
    (folder / "loop").symlink_to("loop")
    if name.startswith("link/"):
        (tmp_path / "real").mkdir()
        (folder / "link").symlink_to(tmp_path / "real")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    monkeypatch.setattr("openneutron.data.files.files_in", None)  # which lists all files
    check_data(folder)


def test_a_file_that_cannot_be_read_is_named_when_it_is_read(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    samples = read_data(tmp_path)
    assert samples[0].path == tmp_path / "a.png"
    with pytest.raises(InputError, match=r"b\.png cannot be read as an image"):
        list(samples)


def recording(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(80))


WRITERS: dict[str, Callable[[Path], object]] = {
    ".png": image,
    ".wav": recording,
    ".npy": lambda path: np.save(path, np.zeros(3, np.float32)),
    ".npz": lambda path: np.savez(path, x=np.zeros(3, np.float32)),
    ".csv": lambda path: path.write_text("1,2\n"),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    ("damaged", "text"),
    [
        ("b", None),
        ("bd", r"[^.]\. Also, 1 of the next 12 files cannot be read: \S*d\.\w+\.$"),
        (
            "bcdefghijklm",
            r"[^.]\. Also, 11 of the next 12 files cannot be read: "
            r"\S*c\.\w+, (\S*[d-j]\.\w+, ){7}\S*k\.\w+ and 2 others\.$",
        ),
    ],
)
def test_up_to_ten_files_that_cannot_be_read_are_named(
    tmp_path: Path, suffix: str, damaged: str, text: str | None
) -> None:
    for name in "abcdefghijklmn":
        WRITERS[suffix](tmp_path / f"{name}{suffix}")
    for name in damaged:
        (tmp_path / f"{name}{suffix}").write_bytes(b"\x00, neither")
    wanted = rf"b\{suffix}.*{text}" if text else rf"b\{suffix}((?!Also).)*$"
    for call in (
        lambda: list(read_data(tmp_path)),
        lambda: inputs_of_files([tmp_path], [TensorInfo((3,), torch.float32)], transform=lambda _: torch.zeros(3)),
    ):
        with pytest.raises(InputError, match=wanted):
            call()


def test_recordings_of_another_rate_are_named_together(tmp_path: Path) -> None:
    for name, rate in (("a", 8000), ("b", 16000), ("c", 8000), ("d", 44100)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(bytes(80))
    with pytest.raises(InputError, match=r"b\.wav has 16000 frames.* 1 of the next 2 files cannot be read: \S*d\.wav"):
        list(read_data(tmp_path))


def test_a_missing_package_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"Install it: pip install pillow\.$"):
        list(read_data(tmp_path))


@pytest.mark.parametrize(
    ("limit", "most", "text"),
    [
        ("MOST_CHECKED", 2, r" 2 of the next 2 files cannot be read: \S*b\.png, \S*c\.png\.$"),
        ("MOST_CHECKED_BYTES", 16, r" 2 of the next 2 files cannot be read: \S*b\.png, \S*c\.png\.$"),
        ("MOST_CHECKED_BYTES", 15, r" 1 of the next 1 files cannot be read: \S*b\.png\.$"),
        ("MOST_CHECKED_BYTES", 7, r"a\.png((?!Also).)*$"),
    ],
)
def test_the_search_for_files_that_cannot_be_read_is_bounded(
    limit: str, most: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"openneutron.data.sources.{limit}", most)
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=text):
        list(read_data(tmp_path))


def test_the_search_for_files_that_cannot_be_read_ends_after_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.csv" for name in "abcdef"]
    for path in paths:
        path.write_text("no number")
    times = iter([7.0, 7.0, 7.3, 7.5, 7.6])
    with pytest.raises(InputError, match=r" 3 of the next 3 files cannot be read: \S*b\.csv, \S*c\.csv, \S*d\.csv\.$"):
        read_one_of(paths, 0, clock=lambda: next(times))
    assert not list(times)


def test_files_that_are_deleted_are_not_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.csv" for name in "abcd"]
    for path in paths:
        path.write_text("no number")
    paths[1].unlink()

    def read(path: Path) -> None:
        if path == paths[2]:
            path.unlink()  # while the files are read
        read_value(path)

    with pytest.raises(InputError, match=r" 1 of the next 2 files cannot be read: \S*d\.csv\.$"):
        read_one_of(paths, 0, read)


def test_recordings_after_a_damaged_first_one_are_not_named(tmp_path: Path) -> None:
    for name in "abc":
        recording(tmp_path / f"{name}.wav")
    (tmp_path / "a.wav").write_bytes(b"no recording")
    with pytest.raises(InputError, match=r"a\.wav((?!Also).)*$"):
        list(read_data(tmp_path))
    assert read_data(tmp_path)[1].path == tmp_path / "b.wav"


# -------------------------------------------------------------------------------------------------- folders of classes


@pytest.mark.parametrize(
    ("counts", "classes", "labels"),
    [
        ({"dog": 1, "cat": 2}, ("cat", "dog"), (0, 0, 1)),
        ({"10": 1, "2": 1, "0": 1}, ("0", "1", "2", *map(str, range(3, 11))), (0, 10, 2)),
        ({"cat": 1, "7": 1}, ("7", "cat"), (0, 1)),
    ],
)
def test_names_of_folders_are_classes(counts: Any, classes: Any, labels: Any, tmp_path: Path) -> None:
    samples = read_data(labelled_folder(tmp_path, counts), labelled=True)
    assert (samples.classes, samples.labels) == (classes, labels)
    assert tuple(sample.label for sample in samples) == labels


def test_a_class_without_files_keeps_its_index(tmp_path: Path) -> None:
    labelled_folder(tmp_path, {"a": 1, "c": 1})
    (tmp_path / "b").mkdir()
    samples = read_data(tmp_path, labelled=True)
    assert (samples.classes, samples.labels) == (("a", "b", "c"), (0, 2))


def test_files_outside_of_the_classes_are_named(tmp_path: Path) -> None:
    image(labelled_folder(tmp_path, {"a": 1, "b": 1}) / "stray.png")
    with pytest.warns(SkippedFilesWarning, match=r"1 file in '.*' is in no folder of a class .*: stray\.png"):
        samples = read_data(tmp_path, labelled=True)
    assert samples.labels == (0, 1)
    with pytest.raises(InputError, match=r"has no folders of classes\. Give a folder with one folder for each class"):
        read_data(tmp_path / "a", labelled=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02012849 crane\nn03126707 crane\n\n"),
        ("labels.json", '["n01440764 tench, Tinca tinca", "n01443537 goldfish", "n02012849 crane", "n03126707 crane"]'),
        ("labels.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n02012849", "crane"], '
                        '"3": ["n03126707", "crane"]}'),
        ("labels.json", '{"n01440764 tench": 0, "n01443537 goldfish": 1, "n02012849 crane": 2, "n03126707 crane": 3}'),
    ],
)  # fmt: skip
def test_names_of_a_labels_file(name: str, content: str, tmp_path: Path) -> None:
    labels = text(tmp_path / name, content)
    for number, folders in enumerate((["n01443537", "n03126707"], ["Goldfish", "3"], ["1", "n03126707"])):
        folder = labelled_folder(tmp_path / str(number), dict.fromkeys(folders, 1))
        samples = read_data(folder, labelled=True, labels=labels)
        assert sorted(samples.labels or ()) == [1, 3]
        assert len(samples.classes or ()) == 4
    folder = labelled_folder(tmp_path / "other", {"crane": 1})
    with pytest.raises(InputError, match=r"The names of the folders in .* do not fit the labels: The class 'crane'"):
        read_data(folder, labelled=True, labels=labels)
    folder = labelled_folder(tmp_path / "more", {"4": 1})
    with pytest.raises(InputError, match="The class 4 is not in the labels, which has the classes 0 to 3"):
        read_data(folder, labelled=True, labels=labels)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", b"", "has no names of classes"),
        ("labels.txt", b"cat\n\ndog\n", "has no name for class 1: its line 2 is empty"),
        ("labels.txt", b"\xff\xfe", "are not text in UTF-8"),
        ("labels.json", b"{", "are neither a list of names"),
        ("labels.json", b"3", "are neither a list of names"),
        ("labels.json", b'{"0": "a", "2": "b"}', "are neither a list of names"),
        ("labels.json", b'{"a": "b"}', "are neither a list of names"),
    ],
)
def test_wrong_labels_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / name)
    with pytest.raises(InputError, match="Cannot read"):
        read_labels(tmp_path / "nowhere.txt")
    assert read_labels(["cat", "dog"]).names == ("cat", "dog")


def test_arrays_whose_first_dimension_counts_samples(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    np.save(tmp_path / "a.npy", array)
    samples = read_data(tmp_path / "a.npy")
    assert len(samples) == 4
    assert all(np.array_equal(sample.inputs, row) for sample, row in zip(samples, array, strict=True))
    assert samples[2].name == f"{tmp_path / 'a.npy'}[2]"
    for labels in ("labels", "y", "Target"):
        arrays: dict[str, Any] = {"x": array, labels: np.array([3.0, 0, 1, 1])}
        np.savez(tmp_path / "a.npz", **arrays)
        assert read_data(tmp_path / "a.npz", labelled=True).labels == (3, 0, 1, 1)
        assert np.array_equal(read_data(tmp_path / "a.npz")[1].inputs, array[1])
    np.savez(tmp_path / "a.npz", a=array, b=-array)
    found = read_data(tmp_path / "a.npz")[3].inputs
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": array[3].tolist(),
        "b": (-array[3]).tolist(),
    }
    np.save(tmp_path / "big.npy", array.astype(">f4"))
    assert torch.equal(torch.from_numpy(read_data(tmp_path / "big.npy")[1].inputs), torch.from_numpy(array[1]))
    # In a folder, a file is one sample.
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "folder" / "0.npz", a=array, b=-array)
    assert read_data(tmp_path / "folder")[0].inputs["a"].shape == (4, 3, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2)), "labels": np.zeros(2, int)}, "different numbers of samples: x 3, labels 2"),
        ({"x": np.zeros((0, 2))}, "has no samples"),
        ({"x": np.float32(3)}, "the array 'x' without dimensions"),
        ({"x": np.zeros((3, 2))}, r"has no array of labels among x\. Give"),
        ({"x": np.zeros((3, 2)), "y": np.full(3, 0.5)}, "has no array of labels among x, y"),
        ({"x": np.array([None, 3])}, "contains Python objects, which are not unpickled"),
        ({}, "has no arrays"),
    ],
)
def test_wrong_archives_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_data(tmp_path / "a.npz", labelled=True)[0]
    for name in ("a.npz", "a.npy"):
        (tmp_path / name).write_bytes(b"no array")
        with pytest.raises(InputError, match=r"cannot be read as (an array|arrays): it has neither the format"):
            read_data(tmp_path / name)[0]
    np.save(tmp_path / "b.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(InputError, match="contains Python objects"):
        read_data(tmp_path / "b.npy")[0]


def test_files_that_hold_no_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png' is not a file of labelled samples"):
        read_data(image(tmp_path / "a.png"), labelled=True)
    assert len(read_data(tmp_path / "a.png")) == 1
    with pytest.raises(InputError, match=r"a\.pt' is not a file of samples \(\.csv, .*\)"):
        read_data(text(tmp_path / "a.pt", ""))


def test_recordings_of_different_rates(tmp_path: Path) -> None:
    write_wave(tmp_path / "a.wav", rate=16000)
    write_wave(tmp_path / "b.wav", rate=44100)
    samples = read_data(tmp_path)
    assert samples[0].inputs.rate == 16000
    with pytest.raises(InputError, match=r"b\.wav has 44100 frames per second, but .*a\.wav has 16000\. Resample"):
        samples[1]


# ------------------------------------------------------------------------------------------------------------ functions


def test_results_of_functions(tmp_path: Path) -> None:
    file = text(
        tmp_path / "my_data.py",
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "x, y = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 0, 1])\n"
        "def inputs():\n    yield from x\n"
        "def pairs():\n    return zip(x, y.tolist())\n"
        "def dataset():\n    return TensorDataset(x, y)\n"
        "def loader():\n    return DataLoader(TensorDataset(x, y), batch_size=2)\n"
        "listed = list(pairs())\n",
    )
    rows = [[0, 1], [2, 3], [4, 5]]
    samples = read_data(f"{file}:inputs")
    assert [[s.inputs.tolist() for s in samples] for _ in range(2)] == [rows, rows]
    assert (len(samples), samples[2].inputs.tolist(), samples.paths) == (3, [4, 5], None)
    for name in ("pairs", "dataset", "loader", "listed"):
        samples = read_data(f"{file}:{name}", labelled=True)
        assert [np.ravel(s.inputs).tolist() for s in samples] == rows, name
        assert [int(s.label) for s in samples] == [2, 0, 1]
        assert len(samples) == 3
        assert [int(s.label) for s in samples.limited(2)] == [2, 0]
        assert samples[1].name == f"sample 1 of '{file}:{name}'"
    doubled = read_data(f"{file}:dataset", labelled=True, transform=lambda x: 2 * x)
    assert doubled[1].inputs.tolist() == [4, 6]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def data(count): ...", "is called without arguments to get the data, failed: TypeError: data\\(\\) missing"),
        ("def data():\n    raise OSError('gone')", r"failed: OSError: gone"),
        ("def data(): ...", r"must be or return an iterable of inputs, .* not a NoneType"),
        ("data = 3", "must be or return an iterable"),
        ("def data():\n    yield 3", "Sample 0 of .* is a int instead of a pair of inputs and label"),
    ],
)
def test_wrong_functions_are_refused(code: str, message: str, tmp_path: Path) -> None:
    file = text(tmp_path / "bad_data.py", code)
    with pytest.raises(InputError, match=message):
        list(read_data(f"{file}:data", labelled=True))
    with pytest.raises(OptionError, match="no such name"):
        read_data(f"{file}:dat")
    with pytest.raises(OptionError, match="no such name"):
        check_data(f"{file}:dat")
    with pytest.raises(InputError, match="does not exist"):
        read_data("photos")
    with pytest.raises(OptionError, match=r"names a file, but no object in it\. Give '.*:NAME'"):
        read_data(str(file))
    with pytest.raises(OptionError, match=r"The data '' must have the form"):
        read_data("")
    with pytest.raises(InputError, match="does not exist"):
        read_data(f"{tmp_path / 'none.py'}:data")


# ----------------------------------------------------------------------------------------------------- limit, transform


def test_a_limit_takes_samples_evenly(tmp_path: Path) -> None:
    labelled_folder(tmp_path, {"a": 8, "b": 2, "c": 4})
    samples = read_data(tmp_path)
    assert names(samples.limited(3), tmp_path) == ["a/0.png", "a/4.png", "b/1.png"]
    assert read_data(tmp_path, limit=99) == samples
    counts = {limit: [0, 0, 0] for limit in (2, 3, 7, 9, 13)}
    for limit, found in counts.items():
        chosen = read_data(tmp_path, labelled=True, limit=limit)
        assert len(chosen) == len(list(chosen)) == limit == len(set(chosen.paths or ()))
        assert list(chosen.paths or ()) == sorted(chosen.paths or ())
        for label in chosen.labels or ():
            found[label] += 1
    assert counts == {2: [1, 1, 0], 3: [1, 1, 1], 7: [3, 2, 2], 9: [4, 2, 3], 13: [7, 2, 4]}
    chosen = read_data(tmp_path, labelled=True, limit=7)
    assert names(chosen, tmp_path)[:3] == ["a/0.png", "a/2.png", "a/5.png"]
    assert [sample.label for sample in chosen] == list(chosen.labels or ())
    assert len(chosen.limited(2)) == 2
    for wrong in (0, -1, 1.5, True, "3"):
        with pytest.raises(OptionError, match="limit must be a positive number"):
            samples.limited(wrong)  # type: ignore[arg-type]


def test_a_limit_stops_reading_a_generator() -> None:
    read = []

    def endless() -> Iterator[int]:
        for number in range(10**9):
            read.append(number)
            yield number

    class Endless:
        def __iter__(self) -> Iterator[int]:
            return endless()

    samples = read_data(Endless(), limit=3)
    assert [sample.inputs for sample in samples] == [0, 1, 2]
    assert len(samples) == 3
    assert max(read) == 2
    shorter = read_data(map(int, "12"), limit=3)
    assert len(shorter) == 2


def test_a_transform_is_applied_to_each_sample(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 51)
    samples = read_data(tmp_path, transform=ImageTransform(resize=4, crop=4))
    assert torch.allclose(samples[0].inputs, torch.full((3, 4, 4), 0.2))
    assert read_data(samples).transform == samples.transform

    def fails(image: Any) -> Any:
        raise KeyError("colour")

    with pytest.raises(InputError, match=r"The transform of .*a\.png failed: KeyError: 'colour'"):
        read_data(tmp_path, transform=fails)[0]
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.float32))
    with pytest.raises(
        InputError, match=r"a\.npy: ImageTransform takes an image .*, not ndarray of float32 \(3, 4, 4\)"
    ):
        list(read_data(tmp_path, transform=ImageTransform()))
    with pytest.raises(OptionError, match="transform must be a function"):
        read_data(tmp_path, transform=3)  # type: ignore[arg-type]


def test_samples_of_files_can_be_pickled(tmp_path: Path) -> None:
    labelled_folder(tmp_path, {"a": 2, "b": 2})
    samples = read_data(tmp_path, labelled=True, transform=ImageTransform(), limit=2)
    again = pickle.loads(pickle.dumps(samples))
    assert again == samples
    assert isinstance(again.source, FileSource)
    assert torch.equal(again[1].inputs, samples[1].inputs)


@pytest.mark.parametrize("shape", ["(2, 7), } ]", "(99999999999999999999,)}", "(999999999999999,)}"])
def test_damaged_header_of_an_array(tmp_path: Path, shape: str) -> None:
    """numpy raises TokenError, OverflowError and MemoryError for these headers."""
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 7), np.int8))
    data = path.read_bytes()
    start, end = data.index(b"(2, 7)"), data.index(b"\n")
    path.write_bytes(data[:start] + shape.encode().ljust(end - start) + data[end:])
    with pytest.raises(InputError, match=r"a\.npy cannot be read as an array"):
        read_array(path)
