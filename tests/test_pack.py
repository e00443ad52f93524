"""Packed data: the same losses as on the images, resumed exactly, refused where they misfit."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stage_two_toy import recipe, saved_parts
from unicompress import cli
from unicompress.checkpoint import load_safetensors, read_json, save_safetensors, write_json
from unicompress.cli.pack import encoding_on
from unicompress.errors import CheckpointError, HostMismatchError, InputError, RecipeError
from unicompress.training import pack as packing
from unicompress.training.feed import Place
from unicompress.training.pack import pack, process_place
from unicompress.training.packed import MANIFEST, PackedSource, check_packed, written_shards
from unicompress.training.recipe import StageTwoRecipe
from unicompress.training.samples import SceneSource, mixture, to_pixels
from unicompress.training.stage_two import StageTwo, UnifiedBatches, build_model, train_stage_two


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a host and of a plug-in around it."""
    return saved_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the forked processes: another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicompress.training.language.TEXT_SAMPLES", 10)


def packed_recipe(given: StageTwoRecipe, *folders: Path) -> StageTwoRecipe:
    data = [{"kind": "packed", "path": str(folder)} for folder in folders]
    return StageTwoRecipe(**{**given.model_dump(), "data": data})


def no_encoding(*_: object) -> None:
    raise AssertionError("the tokenizer ran")


@pytest.mark.parametrize("dense", [False, True], ids=["compressed", "dense"])
@pytest.mark.parametrize("source", ["continuous", "quantized"])
def test_stage_two_has_the_same_losses_as_on_the_images(
    dense: bool,
    source: str,
    parts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = recipe(tmp_path, parts, understanding_source=source, caption_dropout=0.5)
    if dense:
        given = given.model_copy(update={"codec": None})
    model = build_model(given)
    pack(given, model, tmp_path / "packed", count=16, shard=5)
    from_pack = packed_recipe(given, tmp_path / "packed")
    batches = [UnifiedBatches(one, 32, Place()) for one in (given, from_pack)]
    objective = StageTwo(model, given)
    for step in range(2):
        images, packed = (each.at(step)[0] for each in batches)
        assert images.questions == packed.questions
        assert images.captions == packed.captions
        plain, _ = objective(images, 0.0, {})
        with monkeypatch.context() as patch:
            patch.setattr(type(model.tokenizer), "encode", no_encoding)
            patch.setattr(type(model.tokenizer), "quantize", no_encoding)
            fast, _ = objective(packed, 0.0, {})
        torch.testing.assert_close(fast, plain)


def test_a_whole_run_on_packed_data(parts: tuple[Path, Path], tmp_path: Path) -> None:
    given = recipe(tmp_path / "images", parts)
    pack(given, build_model(given), tmp_path / "packed", count=16, shard=8)
    from_pack = packed_recipe(recipe(tmp_path / "run", parts), tmp_path / "packed")
    for each in (given, from_pack):
        assert train_stage_two(each).status == "done"
    logs = []
    for folder in ("images", "run"):
        text = (tmp_path / folder / "log.jsonl").read_text()
        logs.append([json.loads(line)["loss"] for line in text.splitlines() if '"loss"' in line])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert len(logs[0]) >= 2


def test_packing_goes_on_where_it_stopped(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    pack(given, model, tmp_path / "whole", count=10, shard=4)
    plain, seen = packing._write_shard, []

    def breaks(*arguments: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(arguments)
        plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_shard", breaks)
        with pytest.raises(KeyboardInterrupt):
            pack(given, model, tmp_path / "parts", count=10, shard=4)
    assert len(PackedSource(tmp_path / "parts", questions=1)) == 4
    (done,) = pack(given, model, tmp_path / "parts", count=10, shard=4)
    assert (done.count, done.written, done.complete) == (10, 6, True)
    (again,) = pack(given, model, tmp_path / "parts", count=10, shard=4)
    assert again.written == 0
    assert_same_packs(tmp_path / "whole", tmp_path / "parts")


def test_a_pack_that_grows_is_the_one_of_the_larger_count(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    pack(given, model, tmp_path / "whole", count=10, shard=4)
    pack(given, model, tmp_path / "grown", count=6, shard=4)
    (grown,) = pack(given, model, tmp_path / "grown", count=10, shard=4)
    assert grown.written == 6  # the short shard once more, and the last
    assert_same_packs(tmp_path / "whole", tmp_path / "grown")
    (less,) = pack(given, model, tmp_path / "grown", count=5, shard=4)
    assert (less.count, less.written) == (10, 0)
    with pytest.raises(CheckpointError, match="differs in shard"):
        pack(given, model, tmp_path / "grown", count=10, shard=5)


def assert_same_packs(one: Path, other: Path) -> None:
    """The same files, to the last bit of every tensor and note."""
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in other.iterdir()) == names
    assert read_json(one / MANIFEST) == read_json(other / MANIFEST)
    for name in set(names) - {MANIFEST}:
        first, second = load_safetensors(one / name), load_safetensors(other / name)
        assert first[1] == second[1], name
        assert first[0].keys() == second[0].keys()
        assert all(torch.equal(first[0][key], second[0][key]) for key in first[0]), name


# Several processes


def in_processes(task: Callable[[int], object], count: int = 2) -> list[int]:
    """Exit codes of processes that each do the task with their number; 0 is success."""

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # the parent's threads are not there
        task(rank)

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    return [worker.exitcode if worker.exitcode is not None else 1 for worker in workers]


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs fork"
)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_killed_worker_costs_its_unfinished_shard_only(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    pack(given, model, tmp_path / "one", count=14, shard=3)
    folder, plain = tmp_path / "two", packing._write_shard

    def dies(rank: int) -> None:
        def write(*arguments: Any) -> None:
            if rank == 0 and arguments[2].name > "shard-00001":
                os.kill(os.getpid(), signal.SIGKILL)
            plain(*arguments)

        packing._write_shard = write
        pack(given, model, folder, count=14, shard=3, place=Place(rank, 2))

    assert in_processes(dies) == [-signal.SIGKILL, 0]
    assert [shard.number for shard in written_shards(folder).values()] == [0, 1, 3]
    with pytest.raises(CheckpointError, match=r"samples from 6 on are missing: run the same"):
        PackedSource(folder, questions=1)
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    codes = in_processes(
        lambda rank: pack(given, model, folder, count=14, shard=3, place=Place(rank, 2))
    )
    assert codes == [0, 0]
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    assert_same_packs(tmp_path / "one", folder)


def test_each_process_writes_its_shards_and_the_last_one_knows(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    pack(given, model, tmp_path / "one", count=10, shard=2)
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "three"
    found = [
        pack(
            given,
            model,
            folder,
            count=10,
            shard=2,
            place=Place(rank, 3),
            progress=lambda _, done, of: seen.append((done, of)),
        )[0]
        for rank in (2, 1, 0)
    ]
    assert [each.written for each in found] == [2, 4, 4]
    assert [each.complete for each in found] == [False, False, True]
    assert seen == [(1, 1), (1, 2), (2, 2), (1, 2), (2, 2)]
    assert_same_packs(tmp_path / "one", folder)


def test_launchers_say_which_process_this_is() -> None:
    assert process_place({}) == Place(0, 1)
    assert process_place({"RANK": "3", "WORLD_SIZE": "8"}) == Place(3, 8)
    with pytest.raises(InputError, match="RANK must be a whole number, got 'first'"):
        process_place({"RANK": "first"})


def test_only_what_encodes_is_moved(parts: tuple[Path, Path], tmp_path: Path) -> None:
    model = encoding_on(torch.device("meta"), build_model(recipe(tmp_path, parts)))
    places = {
        name: {p.device.type for p in part.parameters()} for name, part in model.named_children()
    }
    assert places.pop("backbone") == {"cpu"}
    assert set(places) >= {"tokenizer", "codec"}
    assert all(found <= {"meta"} for found in places.values())


def test_the_command_under_a_launcher(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe(tmp_path, parts).model_dump(mode="json")
    (tmp_path / "r.yaml").write_text(json.dumps({"stage-two": values}))
    words = ["pack", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "p"), "--count", "4"]
    words += ["--shard", "2", "--json", str(tmp_path / "p.json")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, done.output
        said.append(done.stdout)
        assert (tmp_path / "p.json").is_file() == (rank == 0)
    assert said[0].startswith("process 2 of 2 is done: 2 new samples in ")
    assert said[1].startswith("4 samples in ")
    (found,) = read_json(tmp_path / "p.json")["packs"]
    assert (found["count"], found["written"], found["unreadable"]) == (4, 2, 0)


# Streams: the order of one process, whoever packs


def stream_of(folder: Path, count: int, broken: tuple[int, ...]) -> dict[str, Any]:
    folder.mkdir()
    lines = []
    for i in range(count):
        Image.fromarray(np.full((40, 40, 3), 5 * i, np.uint8)).save(folder / f"{i:03}.png")
        if i in broken:
            (folder / f"{i:03}.png").write_bytes(b"no picture")
        name = {"file_name": f"{i:03}.png", "text": [f"grey {i}", f"picture {i}"]}
        lines.append(json.dumps(name) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return {"kind": "stream", "path": str(folder), "format": "folder", "caption": "text"}


@pytest.mark.parametrize("shuffle", [0, 3])
def test_streams_are_packed_in_one_order(
    shuffle: int, parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    entry = {**stream_of(tmp_path / "pictures", 9, broken=(0, 4)), "shuffle": shuffle}
    given = recipe(tmp_path, parts, data=[entry])
    model = build_model(given)
    (one,) = pack(given, model, tmp_path / "one", count=11, shard=2)
    captions = {PackedSource(tmp_path / "one", questions=1).at(i).caption for i in range(8)}
    assert len(captions) > 6
    # Nine rows are an epoch: two of its pictures are missing, and one of the next epoch's two.
    assert one.count + one.unreadable == 11
    assert one.unreadable == (3 if shuffle == 0 else one.unreadable) > 1
    for rank in (1, 0):
        pack(given, model, tmp_path / "two", count=11, shard=2, place=Place(rank, 2))
    assert_same_packs(tmp_path / "one", tmp_path / "two")
    for number in (2, 3, 5):
        (tmp_path / "two" / f"shard-{number:05d}.safetensors").unlink()
    reads: list[int] = []
    plain = packing.RowSource.restore
    monkeypatch.setattr(
        packing.RowSource,
        "restore",
        lambda source, state: (reads.append(state["row"]), plain(source, state))[1],
    )
    pack(given, model, tmp_path / "two", count=11, shard=2)
    assert reads == [4]  # not from the beginning
    assert_same_packs(tmp_path / "one", tmp_path / "two")


def test_a_shard_may_be_empty_but_not_all(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    entry = stream_of(tmp_path / "pictures", 6, broken=(0, 1))
    given = recipe(tmp_path, parts, data=[entry])
    model = build_model(given)
    with pytest.raises(InputError, match="none of 2 images could be read"):
        pack(given, model, tmp_path / "none", count=2, shard=2)
    (found,) = pack(given, model, tmp_path / "some", count=6, shard=2)
    assert (found.count, found.unreadable) == (4, 2)
    source = PackedSource(tmp_path / "some", questions=1)
    assert [source.at(i).caption.split()[1] for i in range(5)] == ["2", "3", "4", "5", "2"]


def test_samples_come_back_in_their_places(parts: tuple[Path, Path], tmp_path: Path) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    pack(given, model, tmp_path / "packed", count=7, shard=3)
    source = PackedSource(tmp_path / "packed", questions=2)
    scenes = SceneSource(size=model.tokenizer.spec.image_size, questions=6)
    for place in (0, 2, 3, 5):
        found, wanted = source.at(place), scenes.at(place)
        assert found.caption == wanted.caption
        assert found.questions == wanted.questions[:2]
        read, written = model.encode_image(to_pixels([wanted]))
        assert torch.equal(found.codes, written[0])
        torch.testing.assert_close(found.features, read[0])
    # Six of seven are used, so that even places stay even in the next epoch.
    assert torch.equal(source.at(6).codes, source.at(0).codes)
    assert source.at(9).caption == scenes.at(3).caption


def test_several_entries_go_into_folders(parts: tuple[Path, Path], tmp_path: Path) -> None:
    scenes = [{"kind": "scenes"}, {"kind": "scenes", "seed": 5}]
    given = recipe(tmp_path, parts, data=scenes)
    found = pack(given, build_model(given), tmp_path / "packed", count=2)
    assert [each.folder.name for each in found] == ["0", "1"]
    data = packed_recipe(given, *(each.folder for each in found)).data
    mixed = mixture(data, size=32, seed=0, place=Place(), questions=1)
    assert len({mixed.at(i).caption for i in range(20)}) > 2


def test_another_host_or_plug_in_is_refused(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    folder = tmp_path / "packed"
    pack(given, model, folder, count=2)
    check_packed([str(folder)], model)
    # The decompressor may be refined: nothing packed depends on it.
    model.codec.decompressor.start.data.add_(1)
    check_packed([str(folder)], model)
    dense = build_model(given.model_copy(update={"codec": None}))
    with pytest.raises(HostMismatchError, match="plug_in_fingerprint"):
        check_packed([str(folder)], dense)
    # A compressor without weights changes codes and no tensor.
    other = replace(model.codec.spec, compressor="max")
    model.codec.spec, own = other, model.codec.spec
    with pytest.raises(HostMismatchError, match="plug_in_fingerprint"):
        check_packed([str(folder)], model)
    model.codec.spec = own
    with pytest.raises(HostMismatchError, match="pack the data again"):
        train_stage_two(packed_recipe(given, folder).model_copy(update={"codec": None}))
    with pytest.raises(CheckpointError, match="differs in seed: choose another folder"):
        pack(given.model_copy(update={"seed": 3}), model, folder, count=2)
    next(model.tokenizer.parameters()).data.add_(1)
    with pytest.raises(HostMismatchError, match="host_fingerprint"):
        check_packed([str(folder)], model)


def test_mistakes_are_named(parts: tuple[Path, Path], tmp_path: Path) -> None:
    given = recipe(tmp_path, parts)
    model = build_model(given)
    folder = tmp_path / "packed"
    pack(given, model, folder, count=2)
    with pytest.raises(InputError, match="count and shard must be at least 1, got 0 and 4"):
        pack(given, model, tmp_path / "none", count=0, shard=4)
    with pytest.raises(RecipeError, match="packed already"):
        pack(packed_recipe(given, folder), model, tmp_path / "none", count=1)
    with pytest.raises(RecipeError, match="only stage two can train"):
        to_pixels([PackedSource(folder, questions=1).at(0)])
    mixed = [{"kind": "packed", "path": str(folder)}, {"kind": "scenes"}]
    both = UnifiedBatches(recipe(tmp_path, parts, data=mixed, batch=16), 32, Place())
    with pytest.raises(RecipeError, match="cannot be mixed with images"):
        both.at(0)
    with pytest.raises(InputError, match="there is no process 2 of 2"):
        pack(given, model, folder, count=2, place=Place(2, 2))
    write_json({"format": "other"}, tmp_path / "other" / MANIFEST)
    with pytest.raises(CheckpointError, match="no unicompress-pack-2 folder"):
        PackedSource(tmp_path / "other", questions=1)
    (folder / "shard-old.safetensors").write_bytes(
        (folder / "shard-00000.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"shard-old\.safetensors is damaged or no shard"):
        PackedSource(folder, questions=1)
    (folder / "shard-old.safetensors").unlink()
    shard = folder / "shard-00000.safetensors"
    tensors, notes = load_safetensors(shard)
    save_safetensors(tensors, shard, {**notes, "identity": "{}"})
    with pytest.raises(CheckpointError, match="belongs to another pack"):
        PackedSource(folder, questions=1).at(0)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="damaged or no shard"):
        PackedSource(folder, questions=1)
    shard.write_bytes(whole[:-3] + b"xyz")
    with pytest.raises(CheckpointError, match="damaged"):
        PackedSource(folder, questions=1).at(0)
