"""The host made of a continuous autoencoder: its codebooks, its autoencoders, its fitting."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor

from unicompress.checkpoint import fingerprint, save_safetensors
from unicompress.cli import app
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, InputError, MissingDependencyError
from unicompress.tokenizers import continuous
from unicompress.tokenizers.continuous import Continuous, from_autoencoder
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.tokenizers.product_code import (
    balanced_basis,
    encode,
    fit_books,
    look_up,
    nearest,
    refine_basis,
)
from unicompress.tokenizers.tiny_autoencoder import TinyAutoencoder, load_tiny_autoencoder
from unicompress.training.fit_codebook import FitOptions, fit_codebook, pictures_from, pixel_metric

QUICK = FitOptions(images=6, rounds=4, refinements=1, metric_images=2, decoded_images=1, batch=4)


def pictures(count: int = 6, size: int = 64) -> Tensor:
    """Smooth random pictures: noise of 8x8 pixels, enlarged."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear").tanh()


def host(codes_per_token: int = 4, codebook_size: int = 16) -> Continuous:
    torch.manual_seed(0)
    return Continuous(
        config={"latent_channels": 4, "width": 8},
        image_size=64,
        codes_per_token=codes_per_token,
        codebook_size=codebook_size,
    ).freeze()  # type: ignore[return-value]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def correlated(count: int, dim: int) -> Tensor:
    """Tokens whose channels have very different variances, mixed."""
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(5))
    scales = 2.0 ** -torch.arange(dim).float()
    draws = torch.randn(count, dim, generator=torch.Generator().manual_seed(6))
    return draws * scales @ mixing + 3.0


# Product codes


def test_balanced_coordinates_invert_and_decorrelate() -> None:
    tokens = correlated(500, 8)
    basis = balanced_basis(tokens, 2)
    inward = (tokens - basis.mean) @ basis.into
    torch.testing.assert_close(inward @ basis.out + basis.mean, tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(basis.into @ basis.into.T, torch.eye(8), atol=1e-5, rtol=0)
    covariance = inward.T.cov()
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4 * covariance.max()


def test_chunks_carry_balanced_products_of_variances() -> None:
    tokens = correlated(500, 8)
    basis = balanced_basis(tokens, 2)
    logs = ((tokens - basis.mean) @ basis.into).var(dim=0).log().view(2, 4).sum(dim=1)
    # Consecutive principal axes in order would differ by far more.
    ordered = ((tokens - basis.mean) @ basis.into).var(dim=0).log().sort().values.view(2, 4)
    assert (logs[0] - logs[1]).abs() < 0.2 * (ordered[0].sum() - ordered[1].sum()).abs()


def test_a_metric_makes_plain_distances_distances_under_it() -> None:
    tokens = correlated(200, 6)
    factor = torch.randn(6, 6)
    metric = factor @ factor.T
    basis = balanced_basis(tokens, 3, metric)
    step = torch.randn(6)
    weighed = step @ metric @ step
    # Up to one common scale, the mean eigenvalue.
    found = (step @ basis.into).square().sum() * metric.trace() / 6
    torch.testing.assert_close(found, weighed, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(basis.into @ basis.out, torch.eye(6), atol=1e-4, rtol=0)


def test_nearest_is_the_brute_force_answer() -> None:
    tokens, rows = torch.randn(50, 3), torch.randn(7, 3)
    codes, errors = nearest(tokens, rows)
    distances = torch.cdist(tokens, rows).square()
    assert torch.equal(codes, distances.argmin(dim=1))
    torch.testing.assert_close(errors, distances.min(dim=1).values, atol=1e-4, rtol=1e-4)


def test_fitting_is_deterministic_and_follows_the_generator() -> None:
    tokens = correlated(300, 8)
    options = {"chunks": 2, "size": 16, "rounds": 5}
    first, again = (fit_books(tokens, generator=generator(), **options) for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    other = fit_books(tokens, generator=torch.Generator().manual_seed(9), **options)
    assert not torch.equal(first.rows, other.rows)


def test_dead_rows_are_set_anew() -> None:
    """Forty copies of one token and a few others: most of the rows drawn first are duplicates."""
    tokens = torch.cat([torch.zeros(40, 2), 5 * torch.eye(2), -5 * torch.eye(2)])
    books = fit_books(tokens, chunks=1, size=5, rounds=6, generator=generator())
    assert books.revived > 0
    assert books.error.item() == 0.0  # a row for each of the five different tokens
    assert len(torch.unique(books.rows[0], dim=0)) == 5
    drawn = fit_books(tokens, chunks=1, size=5, rounds=0, generator=generator())
    assert drawn.error.item() > 0


def test_more_codebooks_and_more_rows_lower_the_error() -> None:
    tokens = correlated(600, 8)
    basis = balanced_basis(tokens, 4)
    inward = (tokens - basis.mean) @ basis.into

    def error(chunks: int, size: int) -> float:
        books = fit_books(inward, chunks=chunks, size=size, rounds=8, generator=generator())
        return float(books.error.sum())

    assert error(4, 16) < error(2, 16) < error(1, 16)
    assert error(2, 32) < error(2, 16) < error(2, 4)


def test_refining_turns_the_coordinates_and_lowers_the_error() -> None:
    tokens = correlated(600, 8)
    basis = balanced_basis(tokens, 2)
    inward = (tokens - basis.mean) @ basis.into
    books = fit_books(inward, chunks=2, size=8, rounds=8, generator=generator())
    turned = refine_basis(tokens, basis, books)
    torch.testing.assert_close(turned.into @ turned.out, torch.eye(8), atol=1e-4, rtol=0)
    rows = look_up(books.rows, encode(inward, books.rows))
    before = (inward - rows).square().sum()
    after = ((tokens - turned.mean) @ turned.into - rows).square().sum()
    assert after < before


def test_books_that_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="16 codebook rows need at least as many tokens, got 10"):
        fit_books(torch.randn(10, 4), chunks=2, size=16, rounds=1, generator=generator())
    with pytest.raises(InputError, match="8 channels cannot be cut into 3"):
        balanced_basis(torch.randn(10, 8), 3)


# The tokenizer


def test_tokens_are_patches_of_latents_and_come_back() -> None:
    tokenizer = host()
    pixels = pictures(2)
    latents = tokenizer.network.encode(pixels)
    patches = tokenizer.patches(pixels)
    assert patches.shape == (2, 16, 16)
    second = latents[0, :, :2, 2:4].flatten()  # raster order: the token to the right of the first
    torch.testing.assert_close(patches[0, 1], second)
    decoded = tokenizer.network.decode(latents)
    torch.testing.assert_close(tokenizer.pixels_of_patches(patches), decoded)


def test_coordinates_cancel_without_codebooks() -> None:
    tokenizer = host()
    pixels = pictures(6)
    before = tokenizer.decode(tokenizer.encode(pixels))
    fit_codebook(tokenizer, pictures(6), QUICK)
    assert not torch.equal(tokenizer.into, torch.eye(16))
    torch.testing.assert_close(
        tokenizer.decode(tokenizer.encode(pixels)), before, atol=1e-4, rtol=1e-3
    )


def test_fitting_a_tokenizer_is_deterministic_saved_bit_exactly_and_good(tmp_path: Path) -> None:
    tokenizer, twin = host(), host()
    random = host()
    report = fit_codebook(tokenizer, pictures(), QUICK)
    assert fit_codebook(twin, iter(pictures()), QUICK) == report
    assert fingerprint(tokenizer) == fingerprint(twin)
    assert report.images == 5
    assert report.held_out == 1
    assert report.relative_error < 0.5
    assert report.psnr <= report.psnr_continuous
    dense = tokenizer.encode(pictures())
    fitted = (tokenizer.quantize(dense)[1] - dense).square().mean()
    assert fitted < (random.quantize(dense)[1] - dense).square().mean()
    save_tokenizer(tokenizer, tmp_path)
    found = load_tokenizer(tmp_path)
    assert str(found) == str(tokenizer)
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(
        found.quantize(found.encode(pictures()))[0],
        tokenizer.quantize(tokenizer.encode(pictures()))[0],
    )


def test_more_codes_per_token_reconstruct_better() -> None:
    errors = [
        fit_codebook(host(codes_per_token=count), pictures(), QUICK).relative_error
        for count in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_metric_is_what_the_decoder_shows() -> None:
    """Of a linear decoder J^T J is known: doubling one latent channel's weights counts fourfold."""
    tokenizer = host()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])

    class Linear(torch.nn.Module):
        def decode(self, latents: Tensor) -> Tensor:
            shown = (latents * weights[:, None, None]).repeat_interleave(8, 2)
            return shown.repeat_interleave(8, 3)[:, :3] + shown[:, 3:].mean() * 0

    tokenizer.network = Linear()
    options = replace(QUICK, metric_images=16)
    metric = pixel_metric(tokenizer, torch.randn(16, 16, 16), options, generator())
    found = metric.diagonal().view(4, 4).mean(dim=1)
    expected = torch.tensor([1.0, 4.0, 0.25, 0.0], dtype=torch.float64) * 64
    torch.testing.assert_close(found, expected, rtol=0.15, atol=1e-6)


def test_a_plug_in_works_around_it() -> None:
    """Stage one takes a gradient step, and decompressed tokens decode."""
    tokenizer = host()
    fit_codebook(tokenizer, pictures(), QUICK)
    spec = CodecSpec(
        order="parallel", head="regression", width=16, heads=2, depth=1, global_count=1
    )
    codec = ImageCodec(tokenizer, spec)
    codec.calibrate(pictures(), generator())
    codec.loss(pictures()).total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())
    codes = codec.encode(pictures(2))
    assert codes.shape == (2, 1 + 4, 4)
    assert codec.decode(codes).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"codes_per_token": 5}, "16 channels per token cannot be cut into 5 .* 1, 2, 4, 8, 16"),
        ({"image_size": 60}, "image_size must be a multiple of 16, got 60: use 64"),
        ({"codebook_size": 1}, "codebook_size must be at least 2, got 1"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"config": {"depth": 3}}, "does not take the options"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], said: str) -> None:
    given = {"config": {"latent_channels": 4, "width": 8}, "image_size": 64, "codes_per_token": 4}
    with pytest.raises(InputError, match=said) as error:
        Continuous(**{**given, **options})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_codebooks_of_another_tokenizer_are_refused() -> None:
    tokens = torch.randn(40, 16)
    basis = balanced_basis(tokens, 2)
    books = fit_books(tokens, chunks=2, size=8, rounds=1, generator=generator())
    with pytest.raises(InputError, match=r"shape \(2, 8, 8\) do not fit"):
        host().set_codebooks(basis, books)


# The TAESD family


def write_pair(folder: Path, *, pooled: bool = True, half: bool = False) -> TinyAutoencoder:
    """Files as they are released: one pickle each for encoder and decoder."""
    torch.manual_seed(1)
    network = TinyAutoencoder(latent_channels=4, width=8, pooled=pooled)
    for name in ("encoder", "decoder"):
        part = getattr(network, name).half() if half else getattr(network, name)
        torch.save(dict(part.state_dict()), folder / f"tae_{name}.pth")
    return network.float()


@pytest.mark.parametrize("pooled", [True, False])
def test_a_released_pair_says_how_it_is_built(tmp_path: Path, pooled: bool) -> None:
    network = write_pair(tmp_path, pooled=pooled, half=True)
    tokenizer = from_autoencoder(tmp_path, image_size=64, codes_per_token=4, codebook_size=8)
    assert tokenizer.config == {"latent_channels": 4, "width": 8, "pooled": pooled}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tokenizer.network.state_dict()[name], tensor), name
    torch.testing.assert_close(
        tokenizer.patches(pictures(1)).sum(), network.encode(pictures(1)).sum()
    )


def test_the_official_names_are_kept() -> None:
    names = set(TinyAutoencoder(latent_channels=4, width=8).state_dict())
    assert {"encoder.0.weight", "encoder.2.weight", "encoder.14.bias"} <= names
    assert {"encoder.11.pool.1.weight", "decoder.3.pool.3.weight", "decoder.19.bias"} <= names
    assert "encoder.2.bias" not in names
    assert "decoder.8.pool.0.weight" not in names  # statistics only around the latents


# (latent channels, pooled): every 37th latent and every 401st pixel, both of unit deviation, from
# the official network at the official width with the weights below.
OFFICIAL = {
    (32, True): (
        [-0.699577, -2.165694, 0.929742, -0.029192, -0.554982, -0.738779, 0.052341, -0.146166],
        [0.065949, 1.457585, 0.434459, -1.894473, -0.030186, -0.268083, -1.851527, 0.543812],
    ),
    (4, False): (
        [0.688444, -1.401582],
        [-0.07612, 0.467682, 0.572812, 0.440526, 0.582955, 2.801991, -1.46049, -0.381378],
    ),
}


@pytest.mark.parametrize(("channels", "pooled"), OFFICIAL)
@torch.no_grad()
def test_latents_and_pixels_are_the_official_ones(channels: int, pooled: bool) -> None:
    network = TinyAutoencoder(latent_channels=channels, pooled=pooled)
    draws, weights = np.random.RandomState(0), {}
    for name, tensor in sorted(network.state_dict().items()):
        fan = tensor[0].numel() if tensor.ndim > 1 else 4
        values = draws.standard_normal(tuple(tensor.shape)) * (2 / fan) ** 0.5
        weights[name] = torch.from_numpy(values.astype(np.float32))
    network.load_state_dict(weights)
    place = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    latents = network.encode((280 * place**2).sin())
    latents = latents / latents.std()
    pixels = network.decode(latents)
    pixels = (pixels - pixels.mean()) / pixels.std()
    for found, step, wanted in zip(
        (latents, pixels), (37, 401), OFFICIAL[channels, pooled], strict=True
    ):
        torch.testing.assert_close(
            found.flatten()[::step][: len(wanted)], torch.tensor(wanted), atol=1e-4, rtol=1e-4
        )


def test_the_latent_range_is_squeezed_before_decoding() -> None:
    network = TinyAutoencoder(latent_channels=4, width=8)
    far = torch.full((1, 4, 2, 2), 50.0)
    torch.testing.assert_close(network.decode(far), network.decode(2 * far))


def test_wrong_pairs_are_refused_in_one_line(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "other_encoder.pth").write_bytes((tmp_path / "tae_encoder.pth").read_bytes())
    with pytest.raises(CheckpointError, match=r"2 files named \*encoder\*"):
        from_autoencoder(tmp_path)
    (tmp_path / "other_encoder.pth").unlink()
    with pytest.raises(CheckpointError, match="no pair of the TAESD family"):
        load_tiny_autoencoder(tmp_path / "tae_decoder.pth", tmp_path / "tae_encoder.pth")
    short = {"0.weight": torch.zeros(8, 3, 3, 3)}
    save_safetensors(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="weights differ, first encoder") as error:
        load_tiny_autoencoder(tmp_path / "short.safetensors", tmp_path / "tae_decoder.pth")
    assert "\n" not in str(error.value)
    (tmp_path / "tae_decoder.pth").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(CheckpointError, match="half-downloaded"):
        from_autoencoder(tmp_path)


# Pictures


def test_pictures_of_a_folder_come_once(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for index in range(5):
        Image.new("RGB", (80, 64), (index * 40, 0, 0)).save(tmp_path / f"{index}.png")
    found = list(pictures_from(str(tmp_path), size=32))
    assert len(found) == 5
    reds = sorted(round(float(one[0, 0, 0] + 1) * 127.5) for one in found)
    assert reds == [0, 40, 80, 120, 160]
    tokenizer = host(codebook_size=4)
    report = fit_codebook(tokenizer, pictures_from(str(tmp_path), size=64), QUICK)
    assert (report.images, report.held_out) == (4, 1)


def test_scenes_never_end() -> None:
    stream = pictures_from("scenes", size=64)
    first, second = next(stream), next(stream)
    assert first.shape == (3, 64, 64)
    assert not torch.equal(first, second)


def test_too_few_pictures_and_wrong_options() -> None:
    with pytest.raises(InputError, match="at least 2 images, found 1"):
        fit_codebook(host(), pictures(1), QUICK)
    with pytest.raises(InputError, match="metric must be one of pixels, latent, got 'cosine'"):
        FitOptions(metric="cosine")
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        FitOptions(rounds=0)
    with pytest.raises(InputError, match="no folder"):
        next(pictures_from("missing/folder/of/pictures", size=32))


# The command


def test_the_command_writes_a_tokenizer_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path)
    words = ["fit-codebook", str(tmp_path), "--images", "scenes", "--limit", "6"]
    words += ["--codes-per-token", "4", "--codebook-size", "16", "--image-size", "64"]
    words += ["-o", str(tmp_path / "fitted"), "--json", str(tmp_path / "fit.json")]
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app)(words)
    assert ended.value.code == 0
    assert "16 tokens of 4 codes out of 16" in capsys.readouterr().out
    found = load_tokenizer(tmp_path / "fitted")
    content = json.loads((tmp_path / "fit.json").read_text())
    assert content["fingerprint"] == fingerprint(found)
    assert content["fit"]["images"] == 5
    assert content["options"]["seed"] == 0


def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path)
    words = ["fit-codebook", str(tmp_path), "--images", "scenes", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app)([*words, "--codes-per-token", "3"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 16 channels per token cannot be cut into 3 equal chunks")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# diffusers


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str, *, extra: str) -> None:
        raise MissingDependencyError(f"pip install 'unicompress[{extra}]'")

    monkeypatch.setattr(continuous, "require", absent)
    with pytest.raises(MissingDependencyError, match=r"unicompress\[hosts\]"):
        Continuous(autoencoder="AutoencoderKL")


SMALL = {
    "AutoencoderKL": {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "layers_per_block": 1,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": 4,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "latent_channels": 4,
        "attention_head_dim": 8,
    },
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("pipeline", [False, True])
def test_autoencoders_of_diffusers(name: str, pipeline: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**SMALL[name]).eval()
    network.save_pretrained(tmp_path / "vae" if pipeline else tmp_path)
    tokenizer = from_autoencoder(
        tmp_path, image_size=64, patch=2, codes_per_token=4, codebook_size=16
    ).freeze()
    assert isinstance(tokenizer, Continuous)
    assert tokenizer.factor == 4
    with torch.no_grad():
        found = network.encode(pictures(1))
        latents = found.latent_dist.mean if name == "AutoencoderKL" else found[0]
        wanted = network.decode(latents)[0].clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(pictures(1))), wanted)
    assert str(tmp_path) not in json.dumps(tokenizer.config)
    report = fit_codebook(tokenizer, pictures(), QUICK)
    assert report.relative_error < 1
    save_tokenizer(tokenizer, tmp_path / "fitted")
    again = load_tokenizer(tmp_path / "fitted")
    assert fingerprint(again) == fingerprint(tokenizer)
    assert str(again) == str(tokenizer)
    assert torch.equal(again.encode(pictures(1)), tokenizer.encode(pictures(1)))


def test_folders_without_an_autoencoder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        from_autoencoder(tmp_path)
    with pytest.raises(CheckpointError, match="no folder and no hub id"):
        from_autoencoder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="'UNet2DModel' is no autoencoder"):
        Continuous(autoencoder="UNet2DModel")
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        from_autoencoder("nobody/nothing")
