import io
import json
import logging
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unicompress.data.streams import ImageStream, StreamOptions
from unicompress.errors import InputError
from unicompress.training.feed import Place
from unicompress.training.recipe import StreamData
from unicompress.training.samples import Mixture, mixture

pytest.importorskip("datasets")
pytest.importorskip("pyarrow")
SIZE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 10, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def value_of(sample: Any) -> int:
    return int(sample.pixels[0, 0, 0])


def folder_of(place: Path, values: list[int], broken: dict[str, bytes] | None = None) -> Path:
    """Pictures of one grey value each, with captions and two questions."""
    place.mkdir()
    lines = []
    for value in values:
        (place / f"{value:03}.png").write_bytes(png(value))
        lines.append({"file_name": f"{value:03}.png", "text": f"grey {value}"})
    for name, content in (broken or {}).items():
        (place / name).write_bytes(content)
        lines.append({"file_name": name, "text": "broken"})
    lines = [{**line, "q": ["how grey?", "a dog?"], "a": ["very", "no"]} for line in lines]
    lines.sort(key=lambda line: str(line["file_name"]))
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def parquet_of(place: Path, values: list[int]) -> Path:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": png(value), "path": None} for value in values]
    table = pyarrow.table({"picture": images, "words": [f"grey {value}" for value in values]})
    pyarrow.parquet.write_table(table, place)
    return place


def tar_of(place: Path, values: list[int]) -> Path:
    with tarfile.open(place, "w") as tar:
        for value in values:
            texts = json.dumps({"caption": f"grey {value}"}).encode()
            for name, content in ((f"{value:03}.png", png(value)), (f"{value:03}.json", texts)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return place


def options(path: Path, **changes: Any) -> StreamOptions:
    return StreamOptions(path=str(path), **{"format": "folder", "caption": "text", **changes})


def test_a_folder_gives_pictures_captions_and_questions(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures", [10, 20, 30])
    stream = ImageStream(options(place, question="q", answer="a"), SIZE)
    samples = list(islice(stream, 4))
    assert [value_of(sample) for sample in samples] == [10, 20, 30, 10]  # a second epoch
    assert samples[1].pixels.shape == (SIZE, SIZE, 3)
    assert samples[1].captions == ("grey 20",)
    assert samples[1].questions == (("how grey?", "very"), ("a dog?", "no"))


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "rows.parquet", [10, 20])
    given = options(path, format="parquet", image="picture", caption="words")
    samples = list(islice(ImageStream(given, SIZE), 2))
    assert [(value_of(s), s.captions) for s in samples] == [(10, ("grey 10",)), (20, ("grey 20",))]


def test_a_webdataset_tar_is_read(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "shard.tar", [10, 20])
    given = options(path, format="webdataset", image="png", caption="json.caption")
    samples = list(islice(ImageStream(given, SIZE), 3))
    assert [value_of(s) for s in samples] == [10, 20, 10]
    assert samples[1].captions == ("grey 20",)


def test_unreadable_images_are_counted_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"015.png": png(15)[:40], "016.png": b"", "017.png": b"no picture at all"}
    place = folder_of(tmp_path / "pictures", [10, 20], broken)
    stream = ImageStream(options(place), SIZE)
    with caplog.at_level(logging.WARNING):
        assert [value_of(sample) for sample in islice(stream, 3)] == [10, 20, 10]
    assert stream.skipped_count == 3
    for name in broken:
        assert any(name in line for line in stream.skipped)
        assert name in caplog.text


def test_a_source_without_any_readable_image_is_an_error(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures", [], {"015.png": b"", "016.png": b"x"})
    with pytest.raises(InputError, match=r"no image that can be read \(2 skipped\)"):
        next(ImageStream(options(place), SIZE))


@pytest.mark.parametrize("shuffle", [0, 3])
def test_a_stream_resumes_where_it_was(tmp_path: Path, shuffle: int) -> None:
    place = folder_of(tmp_path / "pictures", [10, 20, 30, 40, 50], {"035.png": b""})
    given = options(place, shuffle=shuffle)
    stream, again = (ImageStream(given, SIZE, seed=1) for _ in range(2))
    expected, states = [], []
    for _ in range(14):
        states.append(stream.state())
        expected.append(value_of(next(stream)))
    for taken in (0, 2, 5, 8):  # in the first epoch, at its end, and in the second
        torch.save(states[taken], tmp_path / "state.pt")
        again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
        assert [value_of(s) for s in islice(again, 14 - taken)] == expected[taken:]
    assert again.skipped_count == stream.skipped_count


def test_shuffling_keeps_every_row_once_per_epoch(tmp_path: Path) -> None:
    values = list(range(10, 90, 10))
    place = folder_of(tmp_path / "pictures", values)
    stream = ImageStream(options(place, shuffle=8), SIZE)
    epochs = [[value_of(s) for s in islice(stream, 8)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == values
    assert values != epochs[0] != epochs[1]


def test_processes_share_the_rows(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures", [10, 20, 30, 40])
    streams = [ImageStream(options(place), SIZE, rank=rank, count=2) for rank in range(2)]
    found = [[value_of(s) for s in islice(stream, 2)] for stream in streams]
    assert found == [[10, 30], [20, 40]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": "words"}, r"has no column 'words'; it has: .*text"),
        ({"format": "zip"}, "unknown data format 'zip': use one of folder, parquet"),
        ({"question": "q"}, "name the question column and the answer column together"),
        ({"path": "nowhere"}, "there is no folder nowhere"),
        ({"path": "nowhere.parquet", "format": "parquet"}, "cannot open nowhere.parquet"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    place = folder_of(tmp_path / "pictures", [10])
    values = {"path": str(place), "format": "folder", "caption": "text", **changes}
    with pytest.raises(InputError, match=message):
        next(ImageStream(StreamOptions(**values), SIZE))


def mixed(place: Path, **changes: Any) -> Mixture:
    entry = StreamData(kind="stream", path=str(place), format="folder", caption="text", **changes)
    return mixture([entry], size=SIZE, seed=0, place=Place(), questions=1)


def test_streams_serve_recipes(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures", [10, 20], {"015.png": b""})
    samples = mixed(place, question="q", answer="a")
    found = [samples.at(i) for i in range(2)]
    assert [sample.caption for sample in found] == ["grey 10", "grey 20"]
    assert [len(sample.questions) for sample in found] == [1, 1]
    assert len(samples.skipped()) == 1
    assert samples.skipped() == []
    again = mixed(place, question="q", answer="a")
    again.restore(samples.state())
    assert again.at(2).caption == samples.at(2).caption == "grey 10"


def test_a_picture_called_like_a_split_hides_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, value in (("bullet_train.png", 10), ("a_test.png", 20), ("dog.png", 30)):
        (folder / name).write_bytes(png(value))
    stream = ImageStream(StreamOptions(path=str(folder), format="folder"), SIZE)
    assert sorted(value_of(next(stream)) for _ in range(3)) == [10, 20, 30]


def test_a_folder_with_splits_is_read_by_split(tmp_path: Path) -> None:
    for split, value in (("train", 10), ("test", 20)):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        (tmp_path / "pictures" / split / "dog.png").write_bytes(png(value))
    options = StreamOptions(path=str(tmp_path / "pictures"), format="folder", split="test")
    assert {value_of(next(ImageStream(options, SIZE))) for _ in range(2)} == {20}
