"""The plug-in around a host: every equation joined, at every rate, on hosts of every kind."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tiny_hosts import tiny
from unicompress import hub
from unicompress.checkpoint import fingerprint, load_safetensors, save_safetensors
from unicompress.codec import PRESETS, CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, HostMismatchError, InputError
from unicompress.requantize import quiet
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.toy import PATCH, ToyMulti, ToyResidual, ToySingle
from unicompress.tokens import Grid

SMALL = CodecSpec(width=16, depth=1, heads=2, global_count=2)
TOYS = ["toy_single", "toy_residual", "toy_multi"]


def small(**changes: Any) -> CodecSpec:
    return dataclasses.replace(SMALL, **changes)


def drawing(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(host: ImageTokenizer, count: int = 3, grid: Grid | None = None) -> Tensor:
    grid = grid or host.spec.grid
    patch = host.spec.image_size // host.spec.grid.rows
    size = (patch * grid.rows, patch * grid.columns)
    return torch.rand(count, 3, *size, generator=drawing(7)) * 2 - 1


def everything(module: nn.Module) -> list[object]:
    """All that a wrapper could leave behind: weights, modes, hooks, attributes, gradients."""
    return [
        fingerprint(module),
        [
            (name, type(part), part.training, sorted(vars(part)), dict(part._forward_hooks))
            for name, part in module.named_modules()
        ],
        [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()],
    ]


@pytest.fixture(params=TOYS)
def host(request: pytest.FixtureRequest) -> ImageTokenizer:
    return tokenizers.get(request.param).tiny()


# Options


def test_the_options_survive_a_round_trip() -> None:
    spec = CodecSpec(strides=(1, 4), nested=True, head="regression", global_codebook_size=9)
    assert CodecSpec.from_dict(spec.to_dict()) == spec
    assert spec.rates == (1, 2, 4)
    for name, preset in PRESETS.items():
        assert CodecSpec.from_dict(preset.to_dict()) == preset, name
    paper = PRESETS["paper"]
    assert (paper.order, paper.head, paper.compressor, paper.global_codebook) == (
        "raster",
        "regression",
        "average",
        "shared",
    )
    assert (paper.stride, paper.global_count, paper.weights[0]) == (2, 4, 1.0)


def test_unknown_and_impossible_options_are_named() -> None:
    with pytest.raises(InputError, match=r"no option 'glbal_count'\. Did you mean 'global_count'"):
        CodecSpec.from_dict({"glbal_count": 3})
    for changes, text in (
        ({"stride": 0}, "stride must be a whole number of at least 1, got 0"),
        ({"stride": True}, "stride must be a whole number"),
        ({"stride": 2.0}, "stride must be a whole number"),
        ({"strides": (2, 0)}, "every entry of strides"),
        ({"strides": 3}, "strides must be a list"),
        ({"global_count": -1}, "global_count must be a whole number of at least 0"),
        ({"order": "spiral"}, "order must be one of raster, block, parallel, got 'spiral'"),
        ({"head": "none"}, "head must be one of"),
        ({"global_codebook": "own"}, "global_codebook must be one of shared, separate"),
        ({"global_codebook_size": 1}, "global_codebook_size must be a whole number of at least 2"),
        ({"lambda_cb": -0.1}, "lambda_cb must be a number of at least 0"),
        ({"lambda_cb": float("nan")}, "lambda_cb must be a number"),
        ({"lambda_cb": float("inf")}, "lambda_cb must be a number"),
        ({"nested": "yes"}, "nested must be a bool, got 'yes'"),
        ({"compressor": None}, "compressor must be a str, got None"),
        ({"local_dropout": 1.0}, "local_dropout must be a number from 0"),
        ({"width": 30}, "width 30 must be a multiple of heads 4"),
    ):
        with pytest.raises(InputError, match=text) as error:
            CodecSpec.from_dict(changes)
        assert "\n" not in str(error.value)


def test_the_papers_setting_makes_68_codes_and_71_positions() -> None:
    codec = ImageCodec(ToySingle(rows=16, columns=16), small(global_count=4))
    assert codec.tokens_per_image() == 68
    assert codec.interface_tokens() == 71
    assert codec.tokens_per_image(global_count=0) == 64
    assert codec.interface_tokens(global_count=0) == 66  # nothing to separate
    assert codec.tokens_per_image(grid=Grid(3, 5)) == 2 * 3 + 4


# Identity, and the host left alone


@pytest.mark.parametrize("name", tokenizers.names())
def test_stride_one_without_globals_is_the_identity(name: str) -> None:
    host = tiny(name).freeze()
    pixels = images(host)
    codes, rows = host.quantize(host.encode(pixels))
    for spec in (
        small(stride=1, global_count=0),
        small(strides=(1,), local_codebook="separate", global_codebook="separate"),
    ):
        codec = ImageCodec(host, spec)
        if spec.identity:
            assert not list(codec.parameters())
            assert codec.decompressor is None
        found = codec.encode(pixels, stride=1, global_count=0)
        assert torch.equal(found, codes)
        assert torch.equal(codec.decompress(found, stride=1, global_count=0), rows)
        assert torch.equal(codec.decode(found, stride=1), host.decode(rows))
        with pytest.raises(InputError, match="nothing to train"):
            codec.loss(pixels, stride=1, global_count=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_host_is_untouched_by_use_training_and_errors(
    host: ImageTokenizer, training: bool
) -> None:
    host.train(training)
    before = everything(host)
    codec = ImageCodec(host, small(lambda_pixel=0.1, lambda_reg=0.1))
    pixels = images(host)
    codec.calibrate(pixels, drawing())
    codec.train()
    codec.loss(pixels).total.backward()
    codec.decode(codec.encode(pixels))
    codec.shuffled_global_gap(pixels)
    with pytest.raises(InputError):
        codec.decompress(torch.full((1, 8, host.spec.codes_per_token), 10**6))
    with pytest.raises(InputError):
        codec.loss(torch.zeros(2, 3, PATCH + 1, PATCH))
    assert everything(host) == before


def test_the_host_is_neither_trained_nor_saved(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, SMALL)
    own = {id(p) for p in codec.parameters()}
    assert not own & {id(p) for p in host.parameters()}
    assert codec.tokenizer is host
    assert not any("host" in name or "tokenizer" in name for name in codec.state_dict())
    codec.double()
    assert host.entries.dtype == torch.float64  # moving the codec moves the host along
    assert codec.encode(images(host).double()).dtype == torch.int64


def test_quiet_puts_modes_back_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].eval()
    module[0].bias.requires_grad_(False)

    def fail() -> None:
        with quiet(module):
            assert not any(part.training for part in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [part.training for part in module.modules()] == [True, True, False]
    assert [p.requires_grad for p in module.parameters()] == [True, False]


# Equations


def test_both_streams_go_through_the_hosts_quantizer(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, SMALL).eval()
    dense = host.encode(images(host))
    tokens = codec.compress(dense)
    assert tokens.length == codec.tokens_per_image() == 8
    assert codec.global_tokens is not None
    torch.testing.assert_close(
        tokens.global_tokens, codec.global_tokens(dense, host.spec.grid), atol=0, rtol=0
    )
    codes, rows = codec.quantize(tokens)
    for part, wanted in ((slice(0, 2), tokens.global_tokens), (slice(2, 8), tokens.local_tokens)):
        assert torch.equal(codes[:, part], host.quantize(wanted)[0])
    torch.testing.assert_close(rows, host.embed(codes))
    assert torch.equal(codec.embed(codes), host.embed(codes))
    assert torch.equal(codec.encode(images(host)), codes)


def test_separate_codebooks_serve_their_stream_only(host: ImageTokenizer) -> None:
    spec = small(
        global_codebook="separate",
        global_codebook_size=5,
        local_codebook="separate",
        local_codebook_size=40,
    )
    codec = ImageCodec(host, spec)
    assert codec.codebook_sizes == (5, 40)
    pixels = images(host, 8)
    codec.calibrate(pixels, drawing())
    codes = codec.encode(pixels)
    assert codes[:, :2].max() < 5
    loss = codec.train().loss(pixels)
    before = {name: value.clone() for name, value in codec.requantizer.state_dict().items()}
    codec.update_codebooks(loss, drawing())
    after = codec.requantizer.state_dict()
    for stream in ("global", "local"):
        name = f"codebooks.{stream}.rows"
        assert not torch.equal(before[name], after[name])
    codes[:, 0] = 5
    with pytest.raises(InputError, match="global codes must lie from 0 to 4, got"):
        codec.decompress(codes)
    half = ImageCodec(host, small(local_codebook="separate", local_codebook_size=40))
    assert half.codebook_sizes == (host.spec.codebook_size, 40)


def test_gradients_reach_the_globals_straight_through(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, small(compressor="gated", lambda_commitment=0.0))
    codec.loss(images(host)).total.backward()
    for part in (codec.global_tokens, codec.compressors):
        assert part is not None
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 0


def test_eq_8_with_the_regression_head(host: ImageTokenizer) -> None:
    codec = ImageCodec(
        host, small(head="regression", lambda_cb=0.3, lambda_commitment=0.7, lambda_spread=0.0)
    )
    pixels = images(host)
    loss = codec.loss(pixels)
    with torch.no_grad():
        dense = host.encode(pixels)
        target = host.on_manifold(host.dense_target(dense))
        rows = host.quantize(dense)[1]
        tokens = codec.compress(dense)
        looked_up = codec.quantize(tokens)[1]
        assert codec.decompressor is not None
        predicted = host.on_manifold(
            codec.decompressor(looked_up[:, :2], looked_up[:, 2:], host.spec.grid, 2, target)
        )
        near = host.on_manifold(host.dense_target(tokens.global_tokens))
    torch.testing.assert_close(loss.regression, F.mse_loss(predicted, target))
    torch.testing.assert_close(loss.codebook, F.mse_loss(predicted, rows))
    torch.testing.assert_close(loss.commitment, F.mse_loss(near, looked_up[:, :2]))
    torch.testing.assert_close(
        loss.total, loss.regression + 0.3 * loss.codebook + 0.7 * loss.commitment
    )


def test_eq_8_with_the_codes_head(host: ImageTokenizer) -> None:
    spec = small(
        lambda_reg=0.5, lambda_cb=2.0, lambda_pixel=0.1, lambda_commitment=0.0, lambda_spread=0.0
    )
    codec = ImageCodec(host, spec)
    pixels = images(host)
    loss = codec.loss(pixels)
    with torch.no_grad():
        dense = host.encode(pixels)
        codes, rows = host.quantize(dense)
        looked_up = codec.quantize(codec.compress(dense))[1]
        assert codec.decompressor is not None
        logits = codec.decompressor(looked_up[:, :2], looked_up[:, 2:], host.spec.grid, 2, rows)
        entropy = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(loss.codebook, entropy)
    torch.testing.assert_close(
        loss.total, 0.5 * loss.regression + 2.0 * loss.codebook + 0.1 * loss.pixel
    )
    assert float(loss.logs["accuracy"]) == float((logits.argmax(-1) == codes).float().mean())
    assert loss.pixel > 0
    assert not any(value.requires_grad for value in loss.logs.values())


def test_globals_of_different_images_are_kept_apart(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, small(lambda_spread=0.5))
    pixels = images(host)
    loss = codec.loss(pixels)
    tokens = loss.streams["global"].tokens.detach().double()  # [b, g, e]
    likeness = 0.0
    for slot in range(2):
        directions = [token / token.norm() for token in tokens[:, slot]]
        likeness += float((sum(directions) / len(directions)).norm() ** 2) / 2
    assert float(loss.logs["global_likeness"]) == pytest.approx(likeness, rel=1e-5)
    plain = loss.codebook + 0.01 * loss.commitment + 0.5 * likeness
    torch.testing.assert_close(loss.total, plain, rtol=1e-5, atol=1e-5)


def test_rows_of_all_places_add_up_to_the_embedding(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, SMALL)
    codes = host.quantize(host.encode(images(host)))[0]
    place = torch.arange(host.spec.codes_per_token)
    torch.testing.assert_close(codec.code_rows[place, codes].sum(-2), host.embed(codes))


def test_what_is_logged(host: ImageTokenizer) -> None:
    logs = ImageCodec(host, SMALL).loss(images(host)).logs
    for name in ("total", "regression", "codebook", "commitment", "accuracy"):
        assert logs[name].ndim == 0
    for stream in ("global", "local"):
        assert 0 < logs[f"{stream}_usage"] <= 1
        assert 1 <= logs[f"{stream}_perplexity"] <= host.spec.codebook_size
    assert 1 <= logs["distinct_codes_per_slot"] <= 3
    assert {"distinct_codes_slot_0", "distinct_codes_slot_1"} <= logs.keys()


@pytest.mark.parametrize("head", ["codes", "regression"])
def test_a_few_steps_learn_and_use_the_globals(head: str) -> None:
    """Images of one color each, and most local tokens hidden: the globals must tell the color."""
    host = ToySingle.tiny().freeze()
    codec = ImageCodec(host, small(stride=8, head=head, local_dropout=0.9, width=32))
    colors = torch.tensor(
        [[r, g, b] for r in (-3.0, 3.0) for g in (-3.0, 3.0) for b in (-3.0, 3.0)]
    )
    pixels = colors[:, :, None, None].expand(-1, -1, 16, 24)
    codec.calibrate(pixels, drawing())
    codec.train()
    optimizer = torch.optim.Adam(codec.parameters(), lr=0.01)
    generator = drawing()
    totals = []
    for _ in range(30):
        loss = codec.loss(pixels, generator=generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        totals.append(float(loss.total.detach()))
    assert min(totals[-5:]) < 0.6 * totals[0]
    assert codec.shuffled_global_gap(pixels) > 0
    assert codec.training
    same = pixels[:1].expand(4, -1, -1, -1)
    assert codec.shuffled_global_gap(same) == 0.0
    assert codec.shuffled_global_gap(pixels, global_count=0) == 0.0
    with pytest.raises(InputError, match="at least two images"):
        codec.shuffled_global_gap(pixels[:1])


def test_draws_need_a_generator_and_repeat_with_it() -> None:
    host = ToySingle.tiny()
    for changes in (
        {"local_dropout": 0.5},
        {"teacher_noise": 0.5, "head": "regression"},
        {"order": "parallel", "parallel_steps": 3},
    ):
        codec = ImageCodec(host, small(**changes)).train()
        with pytest.raises(InputError, match=r"pass a torch\.Generator"):
            codec.loss(images(host))
        first, second, third = (
            float(codec.loss(images(host), generator=drawing(seed)).total.detach())
            for seed in (0, 0, 1)
        )
        assert first == second != third
        if "parallel_steps" not in changes:
            codec.eval().loss(images(host))


# Rates, grids, batches


def test_one_plug_in_serves_every_rate_it_was_built_for(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, small(strides=(1, 4), nested=True)).eval()
    pixels = images(host)
    full = codec.compress(host.encode(pixels)).global_tokens
    for stride, locals_ in ((1, 24), (2, 6), (4, 2)):
        for count in (0, 1, 2):
            codes = codec.encode(pixels, stride=stride, global_count=count)
            assert codes.shape[1] == count + locals_ == codec.tokens_per_image(stride, count)
            assert torch.equal(codes[:, :count], host.quantize(full[:, :count])[0])
            assert codec.decode(codes, stride=stride).shape == pixels.shape
            if (stride, count) != (1, 0):
                assert codec.loss(pixels, stride=stride, global_count=count).total.isfinite()
    with pytest.raises(InputError, match="built for stride 1, 2, 4, got 3"):
        codec.encode(pixels, stride=3)
    with pytest.raises(InputError, match="has 2 global tokens, got 3"):
        codec.encode(pixels, global_count=3)


def test_random_rates_are_those_that_were_asked_for() -> None:
    host = ToySingle.tiny()
    codec = ImageCodec(host, small(strides=(1, 4), nested=True))
    generator = drawing()
    drawn = [codec.sample_rate(generator) for _ in range(400)]
    assert set(drawn) == {(s, g) for s in (1, 2, 4) for g in (0, 1, 2)} - {(1, 0)}
    assert 0.4 < drawn.count((2, 2)) / 400 < 0.75
    fixed = ImageCodec(host, small(strides=(4,)))
    assert {fixed.sample_rate(generator) for _ in range(50)} == {(2, 2), (4, 2)}


@settings(max_examples=8)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    stride=st.integers(1, 4),
    count=st.integers(0, 3),
    order=st.sampled_from(["raster", "block", "parallel"]),
    head=st.sampled_from(["codes", "regression"]),
    toy=st.sampled_from([ToySingle, ToyResidual, ToyMulti]),
)
def test_any_grid_stride_and_count(
    rows: int, columns: int, stride: int, count: int, order: str, head: str, toy: Any
) -> None:
    host = toy(rows=rows, columns=columns)
    spec = small(stride=stride, global_count=count, order=order, head=head)
    codec = ImageCodec(host, spec).eval()
    pixels = images(host, 2)
    codes = codec.encode(pixels)
    cells = -(-rows // stride) * -(-columns // stride)
    assert codes.shape == (2, count + cells, host.spec.codes_per_token)
    decoded = codec.decode(codes)
    assert decoded.shape == pixels.shape
    assert decoded.isfinite().all()


def test_other_picture_sizes_bring_their_own_grid() -> None:
    host = ToySingle.tiny()
    codec = ImageCodec(host, SMALL).eval()
    grid = Grid(3, 5)
    pixels = images(host, 2, grid)
    assert codec.grid_of(pixels) == grid
    codes = codec.encode(pixels)
    assert codes.shape[1] == 2 + 6
    assert codec.decompress(codes, grid=grid).shape == (2, 15, host.spec.code_dim)
    assert codec.loss(pixels).total.isfinite()
    with pytest.raises(InputError, match="multiples of 4"):
        codec.encode(torch.zeros(1, 3, 10, 12))
    with pytest.raises(InputError, match="do not fill a 4x6 grid"):
        codec.compress(host.encode(pixels))


@pytest.mark.parametrize("order", ["raster", "block", "parallel"])
@pytest.mark.parametrize("head", ["codes", "regression"])
def test_cache_and_batch_change_nothing(host: ImageTokenizer, order: str, head: str) -> None:
    codec = ImageCodec(host, small(order=order, head=head)).eval()
    codes = codec.encode(images(host))
    dense = codec.decompress(codes)
    torch.testing.assert_close(codec.decompress(codes, use_cache=False), dense)
    alone = torch.cat([codec.decompress(one[None]) for one in codes])
    torch.testing.assert_close(alone, dense, atol=1e-5, rtol=1e-4)
    expanded = codec.expand(codec.compress(host.encode(images(host))))
    torch.testing.assert_close(expanded.dense, dense)
    if head == "codes":
        assert expanded.codes is not None
        torch.testing.assert_close(host.embed(expanded.codes), dense)
        drawn = [
            codec.decompress(codes, temperature=1.0, generator=drawing(seed)) for seed in (1, 1, 2)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_codes_that_fit_no_rate_are_refused(host: ImageTokenizer) -> None:
    codec = ImageCodec(host, SMALL).eval()
    codes = codec.encode(images(host))
    per_token, entries = host.spec.codes_per_token, host.spec.codebook_size
    for wrong, text in (
        (codes[:, :5], "5 codes per image do not fit stride 2 on a 4x6 grid"),
        (torch.cat([codes, codes], 1), "16 codes per image do not fit"),
        (codes.float(), "codes must be whole numbers of shape"),
        (codes[..., :0], f"tokens, {per_token}]"),
        (codes.clamp(min=entries), f"global codes must lie from 0 to {entries - 1}, got {entries}"),
        (codes - entries, "global codes must lie from 0"),
    ):
        with pytest.raises(InputError) as error:
            codec.check_codes(wrong)
        assert text in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="do not fit"):
        codec.decode(codes, global_count=1)


def test_codes_are_the_same_under_autocast() -> None:
    host = ToySingle.tiny()
    codec = ImageCodec(host, SMALL).eval()
    plain = codec.loss(images(host)).streams["local"].codes
    with torch.autocast("cpu", torch.bfloat16):
        loss = codec.loss(images(host))
    assert torch.equal(loss.streams["local"].codes, plain)
    loss.total.backward()


# On disk and on the hub


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_is_the_same(
    host: ImageTokenizer, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    spec = small(strides=(4,), global_codebook="separate", global_codebook_size=6)
    codec = ImageCodec(host, spec).eval()
    codec.calibrate(images(host), drawing())
    if dtype is not None:
        codec.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in codec.state_dict().items()})
    codec.save_pretrained(tmp_path, dtype=dtype)
    found = ImageCodec.from_pretrained(tmp_path, host)
    assert found.spec == spec
    assert not found.training
    for name, tensor in codec.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    pixels = images(host)
    assert torch.equal(found.encode(pixels), codec.encode(pixels))
    assert torch.equal(found.decode(found.encode(pixels)), codec.decode(codec.encode(pixels)))
    stored, _ = load_safetensors(tmp_path / "model.safetensors")
    assert set(stored) == set(codec.state_dict())


def test_another_host_is_refused(tmp_path: Path) -> None:
    ImageCodec(ToySingle(seed=1), SMALL).save_pretrained(tmp_path)
    ImageCodec.from_pretrained(tmp_path, ToySingle(seed=1))
    ImageCodec.from_pretrained(tmp_path, ToySingle(seed=1).bfloat16())
    for other in (ToySingle(seed=2), ToyMulti()):
        with pytest.raises(
            HostMismatchError, match="trained around the tokenizer toy_sing"
        ) as error:
            ImageCodec.from_pretrained(tmp_path, other)
        assert "\n" not in str(error.value)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no unicompress-codec-1"):
        ImageCodec.from_pretrained(tmp_path, ToySingle())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        ImageCodec.from_pretrained(tmp_path, ToySingle())


def test_an_unreachable_hub_says_what_to_fetch() -> None:
    with pytest.raises(CheckpointError) as error:
        ImageCodec.from_pretrained("someone/some-plug-in", ToySingle())
    assert "fetch model.safetensors and config.json of someone/some-plug-in" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        ImageCodec.from_pretrained("no such/folder/at all", ToySingle())


def test_push_to_hub_uploads_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Address(str):
        repo_id = "someone/plug-in"

    class Api:
        def create_repo(self, hub_id: str, *, private: bool | None, exist_ok: bool) -> Address:
            if hub_id == "someone/else":
                raise OSError(errno.ECONNREFUSED, "Connection refused")
            assert (hub_id, private, exist_ok) == ("someone/plug-in", True, True)
            return Address("https://huggingface.co/someone/plug-in")

        def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None) -> None:
            assert (repo_id, revision) == ("someone/plug-in", None)
            assert sorted(os.listdir(folder_path)) == ["config.json", "model.safetensors"]
            (tmp_path / "up").write_bytes((Path(folder_path) / "model.safetensors").read_bytes())

    monkeypatch.setattr(hub, "HfApi", Api)
    codec = ImageCodec(ToySingle(), SMALL)
    address = codec.push_to_hub("someone/plug-in", private=True)
    assert address == "https://huggingface.co/someone/plug-in"
    stored, _ = load_safetensors(tmp_path / "up")
    assert set(stored) == set(codec.state_dict())
    with pytest.raises(CheckpointError, match=r"someone/else .*Connection refused"):
        codec.push_to_hub("someone/else")
