"""Hosts with one codebook, against the official code: numbers it gave are in fixtures/hosts/.

A fixture holds a small random state dict under the official names, a picture, and what the
official code made of it: X, codes, and the pixels of those codes clamped to [-1, 1].
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from host_fixtures import after_stage_one, fixture, write_shards
from tiny_hosts import tiny
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.tokenizers import weight_files
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.tokenizers.vq_parts import nearest_row
from unicompress.tokens import Grid

HOSTS = ("llamagen", "janus", "emu3", "chameleon", "vqmodel")
OPTIONS = {  # what a checkpoint does not say
    "llamagen": "image_size=16",
    "janus": "image_size=16",
    "emu3": "rows=6, columns=8",
    "chameleon": "image_size=16",
}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def as_llamagen_pickle(state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "vq_ds16_c2i.pt"
    rest = {"optimizer": {"state": {0: {"step": 3}}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model": state, "steps": 7, **rest}, path)
    return path


def as_official_janus(state: dict[str, Tensor], folder: Path) -> Path:
    half = len(state) // 2
    entries = list(prefixed(state, "gen_vision_model.").items())
    language = {"language_model.lm_head.weight": torch.zeros(2, 2)}
    return write_shards(folder, dict(entries[:half]), dict(entries[half:]), language)


def as_folder(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder


def as_lightning(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": state}, folder / "vqgan.ckpt")
    return folder


OFFICIAL: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "llamagen": as_llamagen_pickle,
    "janus": as_official_janus,
    "emu3": as_folder,
    "chameleon": as_lightning,
}


# Against the official code


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name: str, tmp_path: Path) -> None:
    state, numbers = fixture(name)
    host = load_tokenizer(f"{name}({OPTIONS[name]})", OFFICIAL[name](state, tmp_path))
    assert all(weight.dtype == torch.float32 for weight in host.parameters())
    dense = host.encode(numbers["input"])
    torch.testing.assert_close(dense, numbers["x"], atol=1e-5, rtol=0)
    codes, rows = host.quantize(numbers["x"])
    assert torch.equal(codes, numbers["codes"])
    assert torch.equal(host.quantize(dense)[0], numbers["codes"])
    assert len(codes.unique()) > 20  # not all the same by accident
    torch.testing.assert_close(host.decode(rows), numbers["pixels"], atol=1e-5, rtol=0)
    assert numbers["pixels"].std() > 0.1


@pytest.mark.parametrize("name", OFFICIAL)
def test_saved_as_ours_it_is_the_same_host(name: str, tmp_path: Path) -> None:
    """Sizes read off a checkpoint are options like any other, and our own names load as well."""
    state, numbers = fixture(name)
    host = load_tokenizer(f"{name}({OPTIONS[name]})", OFFICIAL[name](state, tmp_path))
    save_tokenizer(host, tmp_path / "ours")
    spec = f"{name}({OPTIONS[name]})"
    for found in (
        load_tokenizer(tmp_path / "ours"),
        load_tokenizer(spec, tmp_path / "ours" / "tokenizer.safetensors"),
    ):
        assert str(found) == str(host)
        assert torch.equal(found.encode(numbers["input"]), host.encode(numbers["input"]))


# The layouts of transformers: the model itself is the reference


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights of a size at which rounding stays rounding; nothing is left at zero or one."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn_like(weight))
        else:
            rows = name == "quantize.embedding.weight"
            weight.normal_(std=1.0 if rows else weight[0].numel() ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def spread(conv: torch.nn.Conv2d | torch.nn.Conv3d, output: Tensor) -> None:
    """Change the map to code space so that its output varies: else all codes are the same."""
    channels = output.transpose(0, 1).flatten(1)
    conv.weight.div_(channels.std(1).view(-1, *[1] * (conv.weight.ndim - 1)))
    conv.bias.sub_(channels.mean(1)).div_(channels.std(1))


def test_janus_of_transformers(tmp_path: Path) -> None:
    model = shaken(
        JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=4,
                num_embeddings=32,
                latent_channels=8,
                base_channels=32,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                num_patches=8,
            )
        )
    )
    with torch.no_grad():  # then its raw distances agree with the official cosines
        rows = model.quantize.embedding.weight
        rows /= rows.norm(dim=-1, keepdim=True)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    spread(model.quant_conv, model.quant_conv(model.encoder(pixels)))
    language = {"model.language_model.norm.weight": torch.zeros(2)}
    write_shards(tmp_path, language, prefixed(model.state_dict(), "model.vqmodel."))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()  # holds nothing that is needed
    host = load_tokenizer("janus(image_size=16)", tmp_path)
    found = model.encode(pixels)
    dense = found.last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(host.encode(pixels), dense)
    codes, rows = host.quantize(dense)
    assert torch.equal(codes.flatten(), found.image_tokens)
    assert len(codes.unique()) > 10
    torch.testing.assert_close(host.decode(rows), model.decode(codes[..., 0]).clamp(-1, 1))


def test_emu3_of_transformers(tmp_path: Path) -> None:
    config = Emu3VQVAEConfig(
        codebook_size=32,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[1],
        hidden_size=32,
    )
    model = shaken(Emu3VQVAE(config))
    pixels = torch.rand(2, 3, 10, 14) * 2 - 1
    clip = pixels[:, None].repeat(1, 4, 1, 1, 1)
    spread(model.quant_conv.conv, model.quant_conv(model.encoder(clip).transpose(1, 2)))
    as_folder(prefixed(model.state_dict(), "model.vqmodel."), tmp_path)
    host = load_tokenizer("emu3(rows=5, columns=7)", tmp_path)
    codes, rows = host.quantize(host.encode(pixels))
    wanted = torch.stack(model.encode(pixels, torch.tensor([[10, 14]] * 2)).image_tokens)
    assert torch.equal(codes, wanted.view(2, 35, 1))
    assert len(codes.unique()) > 10
    torch.testing.assert_close(host.decode(rows), model.decode(wanted).clamp(-1, 1))


def test_chameleon_of_transformers_reads_but_does_not_draw(tmp_path: Path) -> None:
    config = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=32,
        latent_channels=16,
        resolution=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
    )
    model = shaken(ChameleonVQVAE(config))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    spread(model.quant_conv, model.quant_conv(model.encoder(pixels)))
    as_folder(prefixed(model.state_dict(), "model.vqmodel."), tmp_path)
    host = load_tokenizer("chameleon(image_size=16)", tmp_path)
    found = model.encode(pixels)
    dense = host.encode(pixels)
    torch.testing.assert_close(dense, found.last_hidden_state.flatten(2).transpose(1, 2))
    codes, rows = host.quantize(dense)
    assert torch.equal(codes.flatten(), found.image_tokens)
    assert len(codes.unique()) > 10
    with pytest.raises(InputError, match=r"cannot draw them: load Meta's vqgan\.ckpt"):
        host.decode(rows)
    assert "decoder=False" in str(host)


@pytest.mark.parametrize("norm", ["group", "spatial"])
def test_vqmodel_of_diffusers(norm: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = shaken(
        diffusers.VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 32),
            latent_channels=8,
            vq_embed_dim=8 if norm == "spatial" else 4,  # diffusers conditions on latent width
            num_vq_embeddings=32,
            norm_type=norm,
            lookup_from_codebook=norm == "spatial",
        )
    )
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    spread(model.quant_conv, model.encode(pixels).latents)
    model.save_pretrained(tmp_path / "vqvae")
    latents = model.encode(pixels).latents
    _, _, (_, _, index) = model.quantize(latents)
    square = model.encode(pixels[..., :16]).latents
    for source in (tmp_path, tmp_path / "vqvae"):  # a pipeline's folder, or the model's own
        host = load_tokenizer("vqmodel(image_size=16)", source)
        dense = host.encode(pixels)
        assert torch.equal(dense, latents.flatten(2).transpose(1, 2))
        assert torch.equal(host.quantize(dense)[0].flatten(), index)
        assert len(index.unique()) > 10
        rows = host.quantize(host.encode(pixels[..., :16]))[1]
        wanted = model.decode(square).sample.clamp(-1, 1)
        torch.testing.assert_close(host.decode(rows), wanted, atol=1e-5, rtol=0)
    save_tokenizer(host, tmp_path / "ours")
    assert str(load_tokenizer(tmp_path / "ours")) == str(host)


def test_vqmodel_of_before_attention_was_renamed(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    host = tiny("vqmodel")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = host.vq.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in name for name in state)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", **host.config}))
    found = load_tokenizer("vqmodel(image_size=16)", tmp_path)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(found.encode(pixels), host.eval().encode(pixels))


def test_vqmodel_refuses_other_models(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="AutoencoderKL, not a VQModel"):
        load_tokenizer("vqmodel", tmp_path)
    with pytest.raises(InputError, match="no option 'depth'"):
        tokenizers.build("vqmodel(config={'depth': 3})")


# Released sizes


@pytest.mark.parametrize(
    ("spec", "grid", "dim", "code_dim", "codes", "millions"),
    [
        ("llamagen", Grid(16, 16), 256, 8, 16384, 72),
        ("llamagen(channel_multiplier=(1, 2, 2, 4))", Grid(32, 32), 256, 8, 16384, 70),
        ("janus", Grid(24, 24), 256, 8, 16384, 72),
        ("emu3", Grid(90, 90), 4, 4, 32768, 271),
        ("chameleon", Grid(32, 32), 256, 256, 8192, 69),
    ],
)
def test_defaults_are_the_released_sizes(
    spec: str, grid: Grid, dim: int, code_dim: int, codes: int, millions: int
) -> None:
    with torch.device("meta"):  # shapes only
        host = tokenizers.build(spec)
    assert (host.spec.grid, host.spec.dim, host.spec.code_dim) == (grid, dim, code_dim)
    assert (host.spec.codebook_size, host.spec.codes_per_token) == (codes, 1)
    assert round(sum(p.numel() for p in host.parameters()) / 1e6) == millions


def test_nearest_rows_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows = torch.randn(2, 5, 3), torch.randn(7, 3)
    whole = nearest_row(tokens, rows)
    monkeypatch.setattr("unicompress.tokenizers.vq_parts.CHUNK", 21)
    assert torch.equal(nearest_row(tokens, rows), whole)
    slow = [
        min(range(7), key=lambda row: (tokens[b, n] - rows[row]).norm().item())
        for b in range(2)
        for n in range(5)
    ]
    assert whole.flatten().tolist() == slow


# Stage one


@pytest.mark.parametrize("name", HOSTS)
def test_stage_one_runs_and_what_it_expands_decodes(name: str, tmp_path: Path) -> None:
    trained, codec = after_stage_one(tiny(name), tmp_path)
    size = trained.spec.image_size
    codes = codec.encode(torch.rand(1, 3, size, size) * 2 - 1)
    assert codes.shape == (1, 2 + trained.spec.grid.length // 4, 1)
    decoded = codec.decode(codes)
    assert decoded.shape == (1, 3, size, size)
    assert torch.isfinite(decoded).all()


def test_a_grid_that_the_stride_does_not_divide_is_compressed_and_expanded() -> None:
    host = tokenizers.build(
        "emu3(rows=3, columns=5, base_channels=32, channel_multiplier=(1, 1), codebook_size=32)"
    ).freeze()
    codec = ImageCodec(host, CodecSpec(width=16, depth=1, heads=2, global_count=2)).eval()
    codes = codec.encode(torch.rand(1, 3, 6, 10) * 2 - 1)
    assert codes.shape == (1, 2 + 2 * 3, 1)
    assert codec.decode(codes).shape == (1, 3, 6, 10)


# Bad input: one line each


def refusal(load: Callable[[], ImageTokenizer]) -> str:
    with pytest.raises(CheckpointError) as error:
        load()
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_checkpoint_of_another_host(name: str, tmp_path: Path) -> None:
    save_file({"encoder.blocks.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    source = tmp_path / "other.safetensors"
    with torch.device("meta"):  # the released size is built to say what is missing
        text = refusal(lambda: load_tokenizer(name, source))
    assert f"does not fit {name} (" in text
    assert "missing: encoder.conv_in.weight" in text
    assert "1 unexpected: encoder.blocks.0.weight" in text
    assert f"get {tokenizers.get(name).layout.files[0]} of" in text


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state, _ = fixture("llamagen")
    state["decoder.conv_out.weight"] = state["decoder.conv_out.weight"].half()[:2]
    state["extra"] = state.pop("quant_conv.bias")
    save_file(state, tmp_path / "a.safetensors")
    text = refusal(lambda: load_tokenizer("llamagen(image_size=16)", tmp_path / "a.safetensors"))
    assert "1 missing: quant_conv.bias; 1 unexpected: extra; " in text
    assert "1 of another shape: decoder.conv_out.weight 2x64x3x3 for 3x64x3x3" in text


def test_missing_shards_are_named(tmp_path: Path) -> None:
    state, _ = fixture("janus")
    as_official_janus(state, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    text = refusal(lambda: load_tokenizer("janus", tmp_path))
    assert "lacks 1 of 2 shards: fetch model-00002-of-00003.safetensors" in text
    write_shards(tmp_path, {"language_model.lm_head.weight": torch.zeros(2, 2)})
    assert "is of another model" in refusal(lambda: load_tokenizer("janus", tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_half_downloaded_files(kind: str, share: float, tmp_path: Path) -> None:
    state, _ = fixture("janus")
    path = tmp_path / f"weights.{kind}"
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    text = refusal(lambda: load_tokenizer("janus", path))
    assert "download" in text
    assert str(path) in text


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "Git LFS pointer" in refusal(lambda: load_tokenizer("llamagen", pointer))
    torch.save([1, 2], tmp_path / "list.pt")
    text = refusal(lambda: load_tokenizer("llamagen", tmp_path / "list.pt"))
    assert "no named weights, but a list" in text
    torch.save({"model": fixture("janus")[0], "hook": torch.nn.Identity()}, tmp_path / "code.pt")
    text = refusal(lambda: load_tokenizer("llamagen", tmp_path / "code.pt"))
    assert "could run code: refused" in text
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "no weight_map" in refusal(lambda: load_tokenizer("janus", tmp_path))


def test_two_names_for_one_weight(tmp_path: Path) -> None:
    state, _ = fixture("llamagen")
    state["encoder.down.0.res.0.conv1.bias"] = torch.zeros(64)
    save_file(state, tmp_path / "a.safetensors")
    text = refusal(lambda: load_tokenizer("llamagen", tmp_path / "a.safetensors"))
    assert "encoder.down.0.block.0.conv1.bias twice" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "FoundationVision/LlamaGen",
            "huggingface.co/FoundationVision/LlamaGen/resolve/main/vq_ds",
        ),
        ("weights/vq_ds16_c2i.pt", "there is no file weights/vq_ds16_c2i.pt: fetch https://hugg"),
        ("/nowhere/at/all", "fetch https://huggingface.co/FoundationVision/LlamaGen/resolve/main/"),
        (".", "holds no weights: put https://huggingface.co/FoundationVision/LlamaGen/"),
        ("a b/c", "neither a file, nor a folder, nor a hub id"),
    ],
)
def test_weights_out_of_reach_say_what_to_fetch(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(lambda: load_tokenizer("llamagen", source))


def test_from_the_hub_only_what_is_needed_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    state, numbers = fixture("janus")
    as_official_janus(state, snapshot)
    fetched = []

    def hub(repo: str, name: str, *, subfolder: str | None, revision: str | None) -> str:
        assert (repo, revision) == ("a/b", "v1")
        path = snapshot / (subfolder or "") / name
        if not path.is_file():
            raise LocalEntryNotFoundError(name)
        fetched.append(name)
        return str(path)

    monkeypatch.setattr(weight_files, "hf_hub_download", hub)
    host = load_tokenizer("janus(image_size=16)", "a/b", revision="v1")
    torch.testing.assert_close(host.encode(numbers["input"]), numbers["x"], atol=1e-5, rtol=0)
    assert set(fetched) == {
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    }
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    text = refusal(lambda: load_tokenizer("janus", "a/b", revision="v1"))
    assert "fetch model-00002-of-00003.safetensors" in text


def test_sizes_that_do_not_fit() -> None:
    for spec, message in (
        ("llamagen(image_size=100)", "image_size must be a multiple of 16, got 100"),
        ("chameleon(image_size=100)", "image_size must be a multiple of 16, got 100"),
        ("emu3(base_channels=20)", "base_channels must be a multiple of 32"),
        ("emu3(rows=0)", "at least one row"),
    ):
        with pytest.raises(InputError, match=message):
            tokenizers.build(spec)
    with pytest.raises(InputError, match="multiples of 2, got 7x8: resize"):
        tiny("emu3").encode(torch.zeros(1, 3, 7, 8))
