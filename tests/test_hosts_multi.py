"""UniTok, VILA-U, UniFork and VAR against numbers that their official code produced.

The fixtures hold seeded random weights under official names (float16, exactly), inputs, and what
the official implementation made of them at toy size: float32, GroupNorm with 4 groups instead of
32, and for VILA-U without its hard-coded casts to bfloat16, unless a name says so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from host_fixtures import after_stage_one, fixture
from unicompress.codec import PRESETS, ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.io import load_tokenizer
from unicompress.tokenizers.unifork import UniFork
from unicompress.tokenizers.unitok import UniTok
from unicompress.tokenizers.var import VAR, phi_index
from unicompress.tokenizers.vila_u import VilaU

HOSTS = {"unitok": UniTok, "vila_u": VilaU, "unifork": UniFork, "var": VAR}


def released(name: str, folder: Path, change: Callable[[dict[str, Tensor]], Any] = dict) -> Path:
    """The fixture's weights in a file laid out as the released one; `change` edits them."""
    weights, _ = fixture("vila_u" if name == "unifork" else name)
    weights = change(weights)
    if name == "unitok":
        path = folder / "unitok_tokenizer.pth"
        content = {
            "args": {"model": "vitamin_large", "dtype": torch.float32},
            "trainer": {"unitok": weights, "disc": {"weight": torch.zeros(2)}},
        }
        torch.save(content, path)
    elif name == "var":
        path = folder / "vae_ch160v4096z32.pth"
        torch.save(weights, path)
    else:
        path = folder / "vision_tower" / "model.safetensors"
        path.parent.mkdir()
        save_file(weights, path)
    return path


def spec_of(name: str) -> str:
    return str(HOSTS[name].tiny())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageTokenizer]:
    """Every host of this file with the official weights, through the loader."""
    found = {}
    for name in HOSTS:
        path = released(name, tmp_path_factory.mktemp(name))
        found[name] = load_tokenizer(spec_of(name), path)
    return found


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@torch.no_grad()
def test_unitok_is_the_official_one(loaded: dict[str, ImageTokenizer]) -> None:
    host, (_, official) = loaded["unitok"], fixture("unitok")
    dense = host.encode(official["input"].float())
    codes, rows = host.quantize(dense)
    same(dense, official["features"])
    assert torch.equal(codes.transpose(1, 2), official["codes"].long())  # books before tokens
    same(rows, official["rows"])
    same(host.decode(rows), official["pixels"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "suffix"), [("vila_u", ""), ("unifork", "_24")])
def test_vila_u_is_the_official_one(
    name: str, suffix: str, loaded: dict[str, ImageTokenizer]
) -> None:
    host, (_, official) = loaded[name], fixture("vila_u")
    dense = host.encode(official[f"input{suffix}"].float())
    codes, rows = host.quantize(dense)
    same(dense, official[f"features{suffix}"])
    assert torch.equal(codes, official[f"codes{suffix}"].long().flatten(1, 2))
    same(host.decode(rows), official[f"pixels{suffix}"].clamp(-1, 1))
    if not suffix:
        same(rows, official["rows"])
        # As officially run, the decoder rounds to bfloat16 throughout; that is the difference.
        rounded = official["pixels_bf16"].clamp(-1, 1)
        assert (host.decode(rows) - rounded).abs().mean() <= 2e-2


@torch.no_grad()
def test_var_is_the_official_one(loaded: dict[str, ImageTokenizer]) -> None:
    host, (_, official) = loaded["var"], fixture("var")
    assert isinstance(host, VAR)
    dense = host.encode(official["input"].float())
    codes = host.encode_scales(official["input"].float())
    same(dense, official["features"])
    same(host.decode(dense), official["dense_pixels"])
    assert [part.shape[1] for part in codes] == [side**2 for side in host.scales]
    assert torch.equal(torch.cat(codes, dim=1), official["codes"].long())
    same(host.field_of(codes), official["field"])
    same(host.decode_scales(codes), official["pixels"])


@torch.no_grad()
def test_var_keeps_a_prefix_or_pools(loaded: dict[str, ImageTokenizer]) -> None:
    host, (_, official) = loaded["var"], fixture("var")
    assert isinstance(host, VAR)
    dense = official["features"]
    short = host.prefix(host.scale_codes(dense), stride=2)
    assert [part.shape[1] for part in short] == [1, 4, 9, 16]  # scales up to 4 of 8
    same(host.field_of(short), official["field_prefix"])
    same(host.decode_scales(short), official["pixels_prefix"])
    pooled = host.pooled_scales(dense, stride=2)
    assert torch.equal(torch.cat(pooled, dim=1), official["pooled_codes"].long())
    same(host.field_of(pooled, stride=2), official["pooled_field"])
    # The two are different codes of the same count, and whole pyramids are their own prefix.
    assert not torch.equal(torch.cat(pooled, dim=1), torch.cat(short, dim=1))
    assert len(host.prefix(host.scale_codes(dense), stride=1)) == len(host.scales)


def test_var_keeps_155_of_680_codes_at_full_size() -> None:
    with torch.device("meta"):
        host = VAR()
    codes = [torch.zeros(1, side**2, dtype=torch.long) for side in host.scales]
    kept = {s: sum(p.shape[1] for p in host.prefix(codes, stride=s)) for s in (1, 2, 4)}
    assert kept == {1: 680, 2: 155, 4: 30}


def test_every_scale_goes_through_the_official_convolution() -> None:
    """Two of ten scales are ties, which the toy pyramid of the fixture does not have."""
    official = {10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], 7: [0, 0, 1, 2, 2, 3, 3], 4: [0, 1, 2, 3]}
    for count, wanted in official.items():
        assert [phi_index(place, count) for place in range(count)] == wanted


def test_residual_codes_approach_the_field(loaded: dict[str, ImageTokenizer]) -> None:
    host = loaded["var"]
    dense = fixture("var")[1]["features"]
    errors = []
    for count in (1, 4):
        one = tokenizers.build(spec_of("var").replace("codes=4", f"codes={count}"))
        one.load_state_dict(host.state_dict())
        errors.append((one.quantize(dense)[1] - dense).square().mean())
    assert errors[1] < 0.7 * errors[0]


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_full_sizes_have_the_official_number_of_weights() -> None:
    with torch.device("meta"):
        unitok, vila_u, unifork, var = (kind() for kind in HOSTS.values())
    sizes = {
        "encoder": 332.3,
        "decoder": 352.4,
        "quant_proj": 3.25,
        "post_quant_proj": 7.62,
    }
    for part, count in sizes.items():
        assert millions(getattr(unitok, part)) == pytest.approx(count, rel=2e-3), part
    assert unitok.entries.numel() == 32768 * 8
    decoder = millions(vila_u.decoder) + millions(vila_u.post_quant_conv)
    assert decoder == pytest.approx(42.4, rel=1e-2)
    assert vila_u.codebook.weight.shape == (16385, 1024)
    assert len(vila_u.encoder.layers) == 23
    assert millions(unifork) == millions(vila_u)
    # The official buffer of code counts is no parameter.
    assert sum(p.numel() for p in var.parameters()) == 108_948_355
    grids = [tuple(host.spec.grid) for host in (unitok, vila_u, unifork, var)]
    assert grids == [(16, 16), (16, 16), (24, 24), (16, 16)]
    assert [host.spec.codes_per_token for host in (unitok, vila_u, unifork, var)] == [8, 4, 4, 4]


# Files that do not fit


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {n: t for n, t in weights.items() if name not in n}


@pytest.mark.parametrize(
    ("name", "left_out", "message"),
    [
        ("unitok", "quant_proj.attn.q_bias", r"2 missing: quant_proj\.attn\.q_bias, post_quant"),
        ("unitok", "codebooks.7.codebook", r"entries 7x16x2 for 8x16x2"),
        ("vila_u", "decoder.mid.attn_1.k.weight", r"1 missing: decoder\.mid\.attn_1\.qkv\.weight"),
        ("vila_u", "codebooks", r"1 missing: codebook\.weight"),
        ("var", "qresi_ls.3", r"2 missing: phi\.3\.weight, phi\.3\.bias"),
    ],
)
def test_missing_weights_are_named(name: str, left_out: str, message: str, tmp_path: Path) -> None:
    path = released(name, tmp_path, without(left_out))
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(spec_of(name), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "other"), [("unitok", "var"), ("vila_u", "unitok"), ("var", "vila_u")]
)
def test_the_file_of_another_host_is_refused(name: str, other: str, tmp_path: Path) -> None:
    path = released(other, tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit {name}|no named weights") as error:
        load_tokenizer(spec_of(name), path)
    assert "\n" not in str(error.value)


def test_traps_of_real_checkpoints(tmp_path: Path) -> None:
    """A single stored codebook, a whole model around the host, and codebooks that differ."""
    _, official = fixture("vila_u")
    wanted = load_tokenizer(spec_of("vila_u"), released("vila_u", tmp_path)).state_dict()
    one = without("quantizer.codebooks.3")(fixture("vila_u")[0])
    save_file(one, tmp_path / "one.safetensors")
    found = load_tokenizer(spec_of("vila_u"), tmp_path / "one.safetensors").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    weights, _ = fixture("var")
    around = {f"vae_local.{n}": t for n, t in weights.items()}
    around["language_model.model.norm.weight"] = torch.ones(2)
    save_file(around, tmp_path / "vargpt.safetensors")
    host = load_tokenizer(spec_of("var"), tmp_path / "vargpt.safetensors")
    assert torch.equal(host.get_parameter("codebook.weight"), weights["quantize.embedding.weight"])
    apart = fixture("vila_u")[0]
    apart["rqvaesiglip.quantizer.codebooks.2.weight"] += 1
    save_file(apart, tmp_path / "apart.safetensors")
    with pytest.raises(CheckpointError, match=r"codebooks\.2\.weight differs .* each depth"):
        load_tokenizer(spec_of("vila_u"), tmp_path / "apart.safetensors")
    assert official["codes"].max() < 32  # the padding row is never chosen


# Sizes that do not fit


@pytest.mark.parametrize("name", HOSTS)
def test_wrong_pictures_and_fields_are_refused(name: str) -> None:
    host = HOSTS[name].tiny()
    size, grid = host.spec.image_size, host.spec.grid
    for shape in ((size, size + 1), (2 * size, size), (size // 2, size // 2)):
        with pytest.raises(InputError, match=f"reads {size}x{size} pictures, got .*resize"):
            host.encode(torch.zeros(1, 3, *shape))
    with pytest.raises(InputError, match=rf"{grid.length} dense tokens .*got {grid.length - 1}"):
        host.decode(torch.zeros(1, grid.length - 1, host.spec.code_dim))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unitok(image_size=250)", "multiple of 16, got 250: use 256"),
        ("unitok(code_dim=60)", "code_dim 60 does not divide into 8 codebooks"),
        ("unitok(heads=15)", "width 1024 is not a multiple of heads 15"),
        ("unitok(width=32, heads=4, code_dim=24, depth=1)", "width 32 must be a multiple of"),
        ("vila_u(image_size=0)", "multiple of 16, got 0: use 16"),
        ("var(scales=(1, 4, 4))", r"scales must be two or more sides that grow, got \(1, 4, 4\)"),
        ("var(scales=(16,))", "two or more sides"),
        ("var(channels=40)", "40 channels do not divide into norm_groups=32"),
    ],
)
def test_options_are_checked(spec: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=message):
        tokenizers.build(spec)


def test_pyramids_that_do_not_fit_are_refused() -> None:
    host = VAR.tiny()
    codes = host.encode_scales(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"none for stride 3: use one of 1, 2, 4"):
        host.prefix(codes, stride=3)
    with pytest.raises(InputError, match=r"none for stride 0"):
        host.pooled_scales(host.encode(torch.zeros(1, 3, 32, 32)), stride=0)
    odd = tokenizers.build(spec_of("var").replace("(1, 2, 3, 4, 6, 8)", "(1, 2, 4, 7)"))
    assert isinstance(odd, VAR)
    with pytest.raises(InputError, match=r"7x7 pyramid .* none for stride 2: use one of 1"):
        odd.prefix(codes, stride=2)
    with pytest.raises(InputError, match="1, 4, 9, 16, 36, 64 codes per scale, got 4, 9"):
        host.field_of(codes[1:3])
    with pytest.raises(InputError, match="got none"):
        host.decode_scales([])


def test_an_odd_grid_is_pooled_with_smaller_edge_cells() -> None:
    host = tokenizers.build(spec_of("unifork").replace("image_size=24", "image_size=20")).freeze()
    assert tuple(host.spec.grid) == (5, 5)
    codec = ImageCodec(host, PRESETS["default"]).eval()
    codes = codec.encode(torch.zeros(1, 3, 20, 20), global_count=0)
    assert codes.shape == (1, 9, 4)
    assert codec.decode(codes, global_count=0).shape == (1, 3, 20, 20)


# Stage one


@pytest.mark.parametrize("name", HOSTS)
def test_stage_one_runs_and_its_tokens_decode(name: str, tmp_path: Path) -> None:
    host, codec = after_stage_one(HOSTS[name].tiny(), tmp_path)
    size = host.spec.image_size
    codes = codec.encode(torch.rand(1, 3, size, size) * 2 - 1)
    count = 2 + host.spec.grid.pooled(2).length
    assert codes.shape == (1, count, host.spec.codes_per_token)
    dense = codec.decompress(codes)
    assert dense.shape == (1, host.spec.grid.length, host.spec.code_dim)
    pixels = host.decode(dense)
    assert pixels.shape == (1, 3, size, size)
    assert pixels.std() > 0


def test_unitok_is_wider_than_its_codes() -> None:
    with pytest.raises(InputError, match="width 64 must be larger than code_dim 64"):
        tokenizers.build("unitok(width=64, code_dim=64)")
