"""Samples from tables: rows of numbers, and lists of paths and labels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data_files import image, names, text

from openneutron.data import SkippedFilesWarning, read_data
from openneutron.data.tables import TableHeaderWarning, read_table
from openneutron.errors import InputError

# -------------------------------------------------------------------------------------------------- tables and archives


def test_rows_of_numbers(tmp_path: Path) -> None:
    for content in ("1,2,3\n4,5,6\n", "a,b,c\n1,2,3\n4,5,6\n", "\ufeff1;2;3\n4;5;6\n\n", "1\t2\t3\r\n4\t5\t6"):
        (tmp_path / "a.csv").write_text(content, encoding="utf-8")
        samples = read_data(tmp_path / "a.csv")
        assert [sample.inputs.tolist() for sample in samples] == [[1, 2, 3], [4, 5, 6]]
        assert samples[0].inputs.dtype == np.float32
    text(tmp_path / "a.csv", "x,class,y\n1,cat,2\n3,ant,4\n")
    assert [(s.inputs.tolist(), s.label) for s in read_data(tmp_path / "a.csv", labelled=True)] == [
        ([1, 2], 1), ([3, 4], 0),
    ]  # fmt: skip
    assert read_data(tmp_path / "a.csv", labelled=True).classes == ("ant", "cat")
    assert [sample.label for sample in read_data(tmp_path / "a.csv")] == [None, None]


NUMBERS = [[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.filterwarnings("ignore::openneutron.data.tables.TableHeaderWarning")
@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("0,1,2\n0.5,1,2\n3,4,5\n", NUMBERS),
        ("1,2,3\n0.5,1,2\n3,4,5\n", NUMBERS),
        ("1990;1991;1992\n0.5;1;2\n3;4;5\n", NUMBERS),
        (",0,1,2\n0,0.5,1,2\n1,3,4,5\n", NUMBERS),
        ("Unnamed: 0,a,b,c\n0,0.5,1,2\n1,3,4,5\n", NUMBERS),
        ('"V1","V2","V3"\n0.5,1,2\n3,4,5\n', NUMBERS),
        ('"12","7","40"\n0.5,1,2\n3,4,5\n', NUMBERS),
        ("0,1\n0.5,-1\n", [[0.5, -1.0]]),
        ("0,1,2,label\n0.5,1,2,7\n3,4,5,8\n", NUMBERS),
        # first rows of numbers, which are not taken as a header
        ("0,1\n2,3\n", [[0, 1], [2, 3]]),
        ("0,1,2\n3,4,5\n6,7,8\n", [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ("0,2,1\n0.5,1,2\n", [[0, 2, 1], [0.5, 1, 2]]),
        ("0.0,1.0,2.0\n0.5,1,2\n", [[0, 1, 2], [0.5, 1, 2]]),
        ("0,1,2\n", [[0, 1, 2]]),
        ('"1","2"\n"3","4"\n', [[1, 2], [3, 4]]),
        ("0\n0.5\n", [[0], [0.5]]),
    ],
)
def test_a_row_that_counts_the_columns_is_a_header(header: str, rows: Any, tmp_path: Path) -> None:
    found = read_data(text(tmp_path / "a.csv", header))
    assert [sample.inputs.tolist() for sample in found] == rows


def test_a_header_of_numbers_above_integers_warns(tmp_path: Path) -> None:
    with pytest.warns(TableHeaderWarning, match=r"The first line of '.*a\.csv', 0, 1, 2, is taken for the numbers"):
        found = read_data(text(tmp_path / "a.csv", "0,1,2\n255,0,7\n9,9,9\n"))
    assert [sample.inputs.tolist() for sample in found] == [[255, 0, 7], [9, 9, 9]]


@pytest.mark.parametrize(
    ("content", "warns"),
    [
        ("1,2\n0.5,0.2\n", True),
        ("0,1,2\n0.5,0.2,1\n", True),
        ("0,1,2,3\n0.5,0.2,1,2\n", False),
        ("0,1,2,3\n5,2,1,2\n", True),
        ("a,b\n0.5,0.2\n", False),
        (",0,1\n0,0.5,0.2\n", False),
        ("0,1,label\n0.5,0.2,7\n", False),
    ],
)
def test_a_row_that_counts_few_columns_warns(content: str, warns: bool, tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", content)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        table = read_table(path)
    assert len(table.rows) == 1
    assert [one.category for one in found] == [TableHeaderWarning] * warns


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "a.wav,yes\n1,2\n", 2),
        ("a.csv", "a.WAV\n1\n", 2),
        ("a.csv", '"a.wav","yes"\n1,2\n', 2),
        ("a.csv", "a.png,label\nb.png,cat\n", 2),
        ("a.txt", "a.png 0\n1 2\n", 2),
        ("a.csv", "sepal.length,sepal.width\n1,2\n", 1),
        ("a.csv", "file,label\na.wav,2\n", 1),
    ],
)
def test_a_row_with_the_name_of_a_file_is_not_a_header(name: str, content: str, rows: int, tmp_path: Path) -> None:
    assert len(read_table(text(tmp_path / name, content)).rows) == rows


def test_a_label_named_like_a_column_is_not_a_header(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    found = read_data(text(tmp_path / "a.csv", "a.png,target\nb.png,target\n"), labelled=True)
    assert len(found) == 2


def test_tables_are_samples_of_a_folder_that_has_nothing_else(tmp_path: Path) -> None:
    for number in range(2):
        text(tmp_path / f"{number}.csv", f"a,b\n{number},2\n3,4\n5,6\n")
    assert [sample.inputs.tolist() for sample in read_data(tmp_path)] == [[[n, 2], [3, 4], [5, 6]] for n in range(2)]
    image(tmp_path / "a.png")
    with pytest.warns(SkippedFilesWarning, match=r"2 \.csv"):
        assert len(read_data(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "path,label\nphotos/a b.png,cat\nphotos/c.png,dog\n"),
        ("list.csv", "label,width,file\ncat,8,photos/a b.png\ndog,8,photos/c.png\n"),
        ("list.csv", "photos/a b.png,cat\nphotos/c.png,dog\n"),
        ("list.tsv", "photos/a b.png\tcat\nphotos/c.png\tdog\n"),
        ("list.txt", "photos/a b.png cat\nphotos/c.png dog\n"),
        ("list.csv", '"photos/a b.png", cat\nphotos/c.png, dog\n'),
    ],
)
def test_lists_of_paths_and_labels(name: str, content: str, tmp_path: Path) -> None:
    image(tmp_path / "photos" / "a b.png")
    image(tmp_path / "photos" / "c.png")
    samples = read_data(text(tmp_path / name, content), labelled=True)
    assert (samples.classes, samples.labels) == (("cat", "dog"), (0, 1))
    assert names(samples, tmp_path) == ["photos/a b.png", "photos/c.png"]
    content = content.replace("cat", "5").replace("dog", "0")
    assert read_data(text(tmp_path / name, content), labelled=True).labels == (5, 0)
    assert len(read_data(tmp_path / name)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("a,b\n", r"names 1 files that do not exist|has no rows"),
        ("1,2\n3\n", "line 2, has 1 columns; the lines before it have 2"),
        ("1,2\n3,x\n", "line 2, column 2: 'x' is not a number"),
        ("1.5,2\n3,nan\n", "line 2, has a number that is not finite"),
        ("1.5,2\n3,1e300\n", "line 2, has a number that is not finite"),
        ("path,label\na.png,1\nno.png,2\nnone.png,1\n", r"names 2 files that do not exist: .*no\.png \(line 3\)"),
        ("path\na.png\n", "has no column of labels"),
        ("path,label\na.png,\n", "has 1 rows without a label"),
        ("1,2\n3,4\n", "has no column of labels"),
        ("a.png,1,2\na.png,1,2\n", "has 3 columns of which the first is not a number"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_wrong_tables_are_refused(content: str, message: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        read_data(text(tmp_path / "a.csv", content), labelled=True)
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe1,2")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_data(tmp_path / "a.csv")
