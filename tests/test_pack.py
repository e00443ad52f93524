"""Packed data: the same losses as on the images, resumed exactly, refused where they misfit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unicompress.checkpoint import load_safetensors, read_json, write_json
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, HostMismatchError, InputError, RecipeError
from unicompress.tokenizers.base import tokenizers
from unicompress.tokenizers.io import save_tokenizer
from unicompress.training import pack as packing
from unicompress.training.feed import Place
from unicompress.training.pack import pack
from unicompress.training.packed import MANIFEST, PackedSource, check_packed
from unicompress.training.recipe import StageTwoRecipe
from unicompress.training.samples import SceneSource, mixture, to_pixels
from unicompress.training.stage_two import StageTwo, UnifiedBatches, build_model, train_stage_two

LM = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a host and of a plug-in around it."""
    folder = tmp_path_factory.mktemp("parts")
    host = tokenizers.build("toy_single(rows=8, columns=8)")
    save_tokenizer(host, folder / "host")
    torch.manual_seed(0)
    spec = CodecSpec(width=16, depth=1, heads=2, global_count=2)
    ImageCodec(host, spec).save_pretrained(folder / "codec")
    return folder / "host", folder / "codec"


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicompress.training.language.TEXT_SAMPLES", 10)


def recipe(out: Path, parts: tuple[Path, Path], **changes: Any) -> StageTwoRecipe:
    values = {
        "tokenizer": str(parts[0]),
        "codec": str(parts[1]),
        "lm": {"config": LM, "vocab_size": 300},
        "projector": "linear",
        "steps": 2,
        "batch": 4,
        "lr": 1e-2,
        "log_every": 1,
        "validate_images": 4,
        "tensorboard": False,
        "cpu": True,
        "precision": "fp32",
    }
    return StageTwoRecipe(out=str(out), **{**values, **changes})


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
    assert sum(s["count"] for s in read_json(tmp_path / "parts" / MANIFEST)["shards"]) == 4
    (done,) = pack(given, model, tmp_path / "parts", count=10, shard=4)
    assert (done.count, done.written) == (10, 6)
    (again,) = pack(given, model, tmp_path / "parts", count=10, shard=4)
    assert again.written == 0
    folders = tmp_path / "whole", tmp_path / "parts"
    assert read_json(folders[0] / MANIFEST) == read_json(folders[1] / MANIFEST)
    for name in ("shard-00000", "shard-00001", "shard-00002"):
        whole, parted = (load_safetensors(f / f"{name}.safetensors") for f in folders)
        assert whole[1] == parted[1]
        assert all(torch.equal(whole[0][key], parted[0][key]) for key in whole[0])


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
    write_json({"format": "other"}, tmp_path / "other" / MANIFEST)
    with pytest.raises(CheckpointError, match="no unicompress-pack-1 folder"):
        PackedSource(tmp_path / "other", questions=1)
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        PackedSource(folder, questions=1).at(0)
