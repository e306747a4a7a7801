"""Reads files as inputs of a program."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openneutron.core.files import check_is_file, exists, is_folder, similar_path
from openneutron.core.messages import did_you_mean, listed
from openneutron.core.names import distinct_names
from openneutron.core.user_code import code_of_user
from openneutron.data.files import data_files, warn_of_skipped
from openneutron.data.shape_advice import size_advice
from openneutron.data.sources import read_one_of, read_value
from openneutron.data.transforms import Transform, fitted
from openneutron.errors import InputError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FileInputs", "check_files", "inputs_of_files"]


@dataclass(frozen=True)
class FileInputs:
    """The inputs of one run, in the order of the program's inputs, the files that they come from, and a name."""

    inputs: tuple[Any, ...]
    paths: tuple[Path, ...]
    name: str


@dataclass(frozen=True)
class _Slot:
    """One input of a program: its name, and its sizes and dtype if it is a tensor, else its value.

    The input also has the name of its `position`, "input0", unless another input is called so.
    """

    name: str
    position: str
    form: Any
    sizes: tuple[int | None, ...] | None
    value: Any = None

    @property
    def batch(self) -> int:
        return (self.sizes[0] if self.sizes else 1) or 1

    def accepts_sizes(self, shape: Sequence[int]) -> bool:
        sizes = self.sizes or ()
        return len(shape) == len(sizes) and all(own in (None, one) for own, one in zip(sizes, shape, strict=True))

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.sizes or ())
        return f"{self.form.dtype} ({sizes})"


def inputs_of_files(
    files: Sequence[str | os.PathLike[str]],
    forms: Sequence[Any],
    transform: Transform | None = None,
    names: Sequence[str] | None = None,
) -> list[FileInputs]:
    """Reads images, .npy, .npz, CSV and WAV files as inputs of a program. Returns the inputs of each run.

        for run in inputs_of_files(["cat.jpg", "dog.jpg"], program.inputs):
            outputs = program.run(*run.inputs)

    `forms` are `HostProgram.inputs`, or `InputForm`s. `names` are the names of the inputs; by default those of
    `InputForm`s, else "input0", "input1", ... These positions are names of the inputs in each case. Inputs that
    have the same name are called by their positions only.

    For a program with one tensor input, each file is one run, and a folder stands for its files. An array of several
    samples is one run for each batch of the program's size. For a program with several inputs, give the files in the
    order of the inputs, or as "name=path"; or give .npz files that have an array for each input. Constant inputs get
    their values.

    Images and recordings are converted by `transform`, or as in calibration. A missing batch dimension of 1 is added.
    Float values for a quantized input of a program are quantized.

    Raises `InputError` for files that cannot be read or do not fit, and `OptionError` for a wrong name or a
    wrong number of names.
    """
    slots = _slots(forms, names)
    wanted = [slot for slot in slots if slot.sizes is not None]
    if not wanted:
        raise InputError("The program has no tensor inputs. Leave out the files.")
    if not files:
        raise InputError(f"Give a file for each input: {listed(slot.name for slot in wanted)}.")
    given = [_named(os.fspath(file), wanted) for file in files]
    if len(wanted) == 1:
        found = [path for _, path in given for path in _files_of(path)]
        return [run for index in range(len(found)) for run in _runs_of_one(found, index, slots, wanted[0], transform)]
    if all(path.suffix.lower() == ".npz" and name is None for name, path in given):
        return [_run_of_archive(path, slots, wanted, transform) for _, path in given]
    by_name = _paths_by_name(given, wanted)
    values = {name: _one_value(path, _by_name(wanted, name), transform) for name, path in by_name.items()}
    return [FileInputs(_filled(slots, values), tuple(by_name.values()), ", ".join(map(str, by_name.values())))]


def check_files(files: Sequence[str | os.PathLike[str]], names: Mapping[str, str] | None = None) -> None:
    """Checks the files of `inputs_of_files` without reading them.

    `names` has the name of each tensor input of the program by its position ("input0"), if they are known. Raises
    `InputError` for a file that does not exist, a device and a pipe, and `OptionError` for a name that no input has.
    """
    for file in files:
        text = os.fspath(file)
        name, equals, rest = text.partition("=")
        is_named = equals and not exists(text) and (name.isidentifier() or exists(rest))
        path = rest if is_named else text
        if is_named and names is not None:
            _name_of(name, text, names)
        check_is_file(path)
        if not exists(path):
            raise InputError(f"The file '{path}' does not exist.{similar_path(path)}")


def _slots(forms: Sequence[Any], names: Sequence[str] | None) -> list[_Slot]:
    made = []
    given = [getattr(form, "name", "") for form in forms] if names is None else names
    if len(given) != len(forms):
        raise OptionError(
            f"`names` has {len(given)} names ({listed(given)}), but the program has {len(forms)} inputs. Give a name "
            "for each input, as the method input_names() of the program does."
        )
    known = distinct_names(given, "input{}")
    for index, (name, form) in enumerate(zip(known, forms, strict=True)):
        position = f"input{index}" if f"input{index}" not in known else name
        sizes = getattr(form, "sizes", getattr(form, "shape", None))
        is_tensor = sizes is not None and getattr(form, "dtype", None) is not None
        value = getattr(form, "constant", getattr(form, "value", None))
        made.append(_Slot(name, position, form, tuple(sizes) if is_tensor and sizes is not None else None, value))
    return made


def _named(text: str, slots: Sequence[_Slot]) -> tuple[str | None, Path]:
    """Splits "name=path". A file whose name contains "=" is a path."""
    name, equals, path = text.partition("=")
    if not equals or exists(text):
        return None, Path(text)
    return _name_of(name, text, {slot.position: slot.name for slot in slots}), Path(path)


def _name_of(given: str, text: str, names: Mapping[str, str]) -> str:
    """Returns the name of the input that `given` means. `names` has the name of each input by its position.

    Raises `OptionError` for a name that no input has.
    """
    known = list(names.values())
    if given in known:
        return given
    if given in names:
        return names[given]
    unnamed = " The program has no names for its inputs, so use these." if known == list(names) else ""
    raise OptionError(
        f"'{given}' in '{text}' is not an input of the program: {listed(known)}.{did_you_mean(given, known)}{unnamed}"
    )


def _files_of(path: Path) -> list[Path]:
    if not is_folder(path):
        return [path]
    found, skipped = data_files(path)
    warn_of_skipped(path, skipped)
    return found


def _paths_by_name(given: Sequence[tuple[str | None, Path]], slots: Sequence[_Slot]) -> dict[str, Path]:
    """Returns the path of each input. Assigns the paths with a name first, then the others by position."""
    names = [slot.name for slot in slots]
    found: dict[str, Path] = {}
    for name, path in given:
        if name in found:
            raise OptionError(f"The input '{name}' is given twice: '{found[name]}' and '{path}'. Leave one out.")
        if name is not None:
            found[name] = path
    rest = [name for name in names if name not in found]
    unnamed = [path for name, path in given if name is None]
    if len(unnamed) != len(rest):
        raise InputError(
            f"The program takes {len(slots)} inputs ({listed(map(_text, slots))}), but {len(given)} files are given. "
            "Give a file for each, in this order or as name=path, or a .npz file with arrays of these names."
        )
    found.update(zip(rest, unnamed, strict=True))
    return {name: found[name] for name in names}


def _text(slot: _Slot) -> str:
    return f"{slot.name}: {slot}"


def _by_name(slots: Sequence[_Slot], name: str) -> _Slot:
    return next(slot for slot in slots if slot.name == name)


def _filled(slots: Sequence[_Slot], values: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple(slot.value if slot.sizes is None else values[slot.name] for slot in slots)


def _runs_of_one(
    paths: Sequence[Path], index: int, slots: Sequence[_Slot], slot: _Slot, transform: Transform | None
) -> Iterator[FileInputs]:
    path = paths[index]
    value = _tensor(path, _transformed(path, _only_array(path, read_one_of(paths, index), slot), slot, transform))
    batches = _batches(value, slot)
    for number, batch in enumerate(batches):
        name = str(path) if len(batches) == 1 else f"{path}[{number * slot.batch}]"
        yield FileInputs(_filled(slots, {slot.name: _fitting(name, batch, slot)}), (path,), name)


def _only_array(path: Path, value: Any, slot: _Slot) -> Any:
    if not isinstance(value, Mapping):
        return value
    name = _name_in(value, slot)
    if name is None:
        raise InputError(
            f"{path} has the arrays {listed(value)}, but none has the name of the input. Save the array as "
            f"'{slot.name}'."
        )
    return value[name]


def _name_in(arrays: Mapping[str, Any], slot: _Slot) -> str | None:
    """Returns the name that an input has among `arrays`: its own or that of its position; None if it has neither."""
    return next((name for name in (slot.name, slot.position) if name in arrays), None)


def _batches(value: Tensor, slot: _Slot) -> Sequence[Tensor]:
    """Splits an array of several samples into batches; returns any other value alone."""
    if slot.accepts_sizes(value.shape) or slot.accepts_sizes((1, *value.shape)) or not value.dim():
        return [value]
    size = slot.batch
    if slot.accepts_sizes((size, *value.shape[1:])) and len(value) % size == 0 and len(value):
        return [*value.split(size)]
    return [value]


def _one_value(path: Path, slot: _Slot, transform: Transform | None) -> Tensor:
    value = _only_array(path, read_value(path), slot)
    return _fitting(str(path), _tensor(path, _transformed(path, value, slot, transform)), slot)


def _run_of_archive(
    path: Path, slots: Sequence[_Slot], wanted: Sequence[_Slot], transform: Transform | None
) -> FileInputs:
    arrays = read_value(path)
    names = [_name_in(arrays, slot) if isinstance(arrays, Mapping) else None for slot in wanted]
    if None in names:
        found = listed(arrays) if isinstance(arrays, Mapping) else "one"
        raise InputError(f"{path} must have the arrays {listed(slot.name for slot in wanted)}, but has {found}.")
    values = {
        slot.name: _fitting(
            f"'{name}' of {path}", _tensor(path, _transformed(path, arrays[name], slot, transform)), slot
        )
        for name, slot in zip(names, wanted, strict=True)
    }
    return FileInputs(_filled(slots, values), (path,), str(path))


def _transformed(path: Path, value: Any, slot: _Slot, transform: Transform | None) -> Any:
    is_float = _is_quantized(slot.form) or getattr(slot.form.dtype, "is_floating_point", True)
    with code_of_user(f"The transform of {path}", place=str(path)):
        return fitted(transform, slot.sizes, is_float=is_float)(value)


def _is_quantized(form: Any) -> bool:
    return getattr(form, "scale", None) is not None


def _tensor(path: Path, value: Any) -> Tensor:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except TypeError as error:
        raise InputError(
            f"The transform made no tensor of {path}: {error}. Return a tensor from the transform."
        ) from error


def _fitting(name: str, value: Tensor, slot: _Slot) -> Tensor:
    """Returns `value` with the batch dimension and dtype of the input. Raises `InputError` if it does not fit."""
    batch = value[None] if slot.accepts_sizes((1, *value.shape)) else value
    dtype = slot.form.dtype
    fits = slot.accepts_sizes(batch.shape)
    if fits and _is_quantized(slot.form) and batch.is_floating_point():
        quantized: Tensor = slot.form.quantize(batch)
        return quantized
    if not fits or batch.dtype != dtype:
        if fits:
            advice = " Save it as float32: array.astype('float32')." if str(dtype) == "torch.float32" else ""
        else:
            advice = size_advice(value.shape, slot.sizes or ())
        raise InputError(f"{name} is {value.dtype} {tuple(value.shape)}; the input '{slot.name}' takes {slot}.{advice}")
    return batch.contiguous()
