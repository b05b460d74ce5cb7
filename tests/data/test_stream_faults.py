"""What cannot be streamed, and what goes while a stream is read: one line each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.faults import DataFault
from fewstep.data.loader import Loader
from fewstep.errors import UserError
from tests.data.stream_lab import (
    FILES,
    encoded,
    in_feather,
    in_parquet,
    opened,
    whole_table,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(multiprocess|dill|datasets).*")


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / "data" / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def nothing_left(root: Path) -> None:
    for name in FILES:
        pq.write_table(whole_table()[:0], root / "data" / name)


@pytest.mark.parametrize(
    ("damage", "options", "line"),
    [
        (cut(FILES[1], 400), {}, rf"data\.path: '.*{FILES[1]}' cannot be read as parquet \(.*\); was it cut short\?"),
        (cut(FILES[0], 0), {}, rf"data\.path: '.*{FILES[0]}' cannot be read as parquet \(.*\); was it cut short\?"),
        (nothing_left, {}, r"data\.path: '.*set' holds no picture"),
        (None, {"split": "test"}, r"data\.options\.split: '.*set' has train; found 'test'"),
        (None, {"split": "train[:5]"}, r"data\.options\.split: '.*set' has train; found 'train\[:5\]'; did you mean"),
        (None, {"config": "small"}, r"data\.path: datasets cannot open '.*set' \(BuilderConfig 'small' not found"),
        (None, {"image_key": "imag"}, r"image_key: no column 'imag'; did you mean 'image'\?; there are image, text"),
        (None, {"image_key": "text"}, r"data\.options\.image_key: column 'text' is a string, one of pictures is need"),
        (None, {"caption_key": "words"}, r"data\.options\.caption_key: no column 'words'; there are image, text"),
        (None, {"caption_key": "image"}, r"has no caption for any of its 23 pictures"),
        (None, {"streaming": False, "buffer": 9}, r"data\.options\.buffer: 9 given; it does nothing without streaming"),
        (None, {"streaming": False, "keep": 9}, r"data\.options\.keep: 9 given; it does nothing without streaming"),
        (None, {"keep": 9}, r"data\.options\.keep: 9 given; it does nothing without a set on the hub"),
        (None, {"revision": "v1"}, r"data\.options\.revision: v1 given; it does nothing without a set on the hub"),
        (None, {"buffer": 0}, r"data\.options\.buffer: input should be greater than or equal to 1; found 0"),
        (None, {"bufer": 9}, r"data\.options\.bufer: unknown key.*did you mean 'buffer'\?"),
    ],
)
def test_what_cannot_be_streamed_gets_one_clear_line(tmp_path, damage, options, line):
    path = in_parquet(tmp_path / "set")
    if damage:
        damage(path)
    with pytest.raises(UserError, match=line) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)


def test_a_cut_arrow_file_gets_one_clear_line(tmp_path):
    path = in_feather(tmp_path / "set") / "train.arrow"
    data, whole = opened(path.parent), path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.arrow' cannot be read as arrow \(.*\); was it cut short\?"):
        opened(path.parent)
    with pytest.raises(DataFault, match=r"train\.arrow row 20' cannot be read any more \(Not an Arrow file"):
        data.batch([20])


@pytest.mark.parametrize(
    ("file", "content", "options", "line"),
    [
        ("state.json", "{", {}, r"state\.json' cannot be read \(.*\); save the set again"),
        ("state.json", "{}", {}, r"state\.json' cannot be read \('_data_files'\); save the set again"),
        ("dataset_dict.json", "[]", {}, r"dataset_dict\.json' cannot be read \(list .*\); save the set again"),
        ("dataset_dict.json", '{"splits": ["train"]}', {}, r"train/state\.json' cannot be read \(No such file or dir"),
        ("state.json", "{}", {"split": "test"}, r"data\.options\.split: test given; it does nothing for what save_to_"),
        ("state.json", "{}", {"config": "a"}, r"data\.options\.config: a given; it does nothing for what save_to_disk"),
        ("dataset_dict.json", "{}", {"config": "a", "streaming": False}, r"config: a given; .*; leave it out"),
    ],
)
def test_what_save_to_disk_says_of_itself_is_read_with_care(tmp_path, file, content, options, line):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=line) as caught:
        opened(tmp_path, **options)
    assert "\n" not in str(caught.value)


def gone(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    pq.write_table(whole_table()[:4], path, row_group_size=2)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (gone, "No such file or directory"),
        (replaced, "2 rows in place of 3"),
        (torn, "(Parquet magic bytes not found|File too short)"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_in_mid_run_is_a_fault_that_names_shard_and_row(tmp_path, fault, line, workers):
    path = in_parquet(tmp_path / "set")
    batches = iter(Loader(opened(path, buffer=1), 1, seed=0, workers=workers))
    next(batches)
    for name in FILES:
        fault(path / "data" / name)
    with pytest.raises(
        DataFault, match=rf"parquet row \d+' cannot be read any more \({line}.*\); put it back"
    ) as caught:
        list(islice(batches, 12))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (b"no picture", r"a\.parquet row 3' cannot be read as an image"),
        (encoded(0)[:90], r"a\.parquet row 3' cannot be read as an image"),
        (None, r"a\.parquet row 3' has no picture"),
    ],
)
@pytest.mark.parametrize("plain_bytes", [True, False])
def test_a_broken_picture_is_named_by_shard_and_row(tmp_path, cell, line, plain_bytes):
    cells = [encoded(i) if i != 3 else cell for i in range(5)]
    pictures = cells if plain_bytes else [{"bytes": one} for one in cells]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": pictures, "text": ["x"] * 5}), tmp_path / "set" / "a.parquet", row_group_size=2)
    data = opened(tmp_path / "set")
    assert data.batch([4, 2]).images.shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match=line):
        data.batch([3])
