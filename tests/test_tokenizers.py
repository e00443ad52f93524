"""The contract of a host, for every registered tokenizer's tiny()."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_hosts import tiny
from unicompress.checkpoint import fingerprint, load_safetensors, save_safetensors
from unicompress.errors import CheckpointError, InputError
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.tokenizers.toy import ToyMulti, ToyResidual, ToySingle

NAMES = tokenizers.names()


def images(tokenizer: ImageTokenizer, count: int = 2) -> Tensor:
    spec = tokenizer.spec
    patch = spec.image_size // spec.grid.rows
    size = (patch * spec.grid.rows, patch * spec.grid.columns)
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module", params=NAMES)
def host(request: pytest.FixtureRequest) -> ImageTokenizer:
    return tiny(request.param).freeze()


def test_all_kinds_of_hosts_are_covered() -> None:
    specs = [tiny(name).spec for name in NAMES if name != "vqmodel"]  # needs diffusers
    assert {spec.codes_per_token for spec in specs} >= {1, 4, 8}
    assert {spec.manifold for spec in specs} == {"none", "l2", "chunk_l2"}
    assert any(spec.grid.rows != spec.grid.columns for spec in specs)


def test_shapes_and_ranges_follow_the_spec(host: ImageTokenizer) -> None:
    spec, pixels = host.spec, images(host)
    dense = host.encode(pixels)
    codes, rows = host.quantize(dense)
    assert dense.shape == (2, spec.grid.length, spec.dim)
    assert codes.shape == (2, spec.grid.length, spec.codes_per_token)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < spec.codebook_size
    assert rows.shape == host.dense_target(dense).shape == (2, spec.grid.length, spec.code_dim)
    decoded = host.decode(rows)
    assert decoded.shape == pixels.shape
    assert -1 <= decoded.min() <= decoded.max() <= 1


def test_looked_up_rows_are_what_was_quantized(host: ImageTokenizer) -> None:
    codes, rows = host.quantize(host.encode(images(host)))
    assert torch.equal(host.embed(codes), rows)
    # Rows lie where the pixel decoder expects them.
    torch.testing.assert_close(host.on_manifold(rows), rows)


def test_any_number_of_tokens_can_be_quantized_alone(host: ImageTokenizer) -> None:
    dense = host.encode(images(host))
    codes, _ = host.quantize(dense)
    for count in (1, 3):
        assert torch.equal(host.quantize(dense[:, :count])[0], codes[:, :count])


def test_raster_order(host: ImageTokenizer) -> None:
    """Changing the lower left of a picture changes the tokens there more than those far away."""
    pixels = images(host, 1)
    changed = pixels.clone()
    patch = host.spec.image_size // host.spec.grid.rows
    changed[..., -patch:, :patch] *= -1
    shift = (host.encode(changed) - host.encode(pixels)).norm(dim=-1)[0]
    rows, columns = host.spec.grid.rows, host.spec.grid.columns
    field = shift.view(rows, columns)
    near = field[rows // 2 :, : columns // 2].mean()
    for far in (field[: rows // 2, columns // 2 :], field[: rows // 2], field[:, columns // 2 :]):
        assert near > far.mean()


def test_a_batch_is_its_images_one_by_one(host: ImageTokenizer) -> None:
    pixels = images(host)
    together = host.encode(pixels)
    alone = torch.cat([host.encode(one[None]) for one in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    rows = host.quantize(together)[1]
    alone = torch.cat([host.decode(one[None]) for one in rows])
    torch.testing.assert_close(host.decode(rows), alone, atol=1e-5, rtol=1e-4)


def test_decode_is_differentiable_and_projects_first(host: ImageTokenizer) -> None:
    rows = host.quantize(host.encode(images(host)))[1]
    dense = (rows + 0.1 * torch.randn_like(rows)).requires_grad_()
    host.decode(dense).sum().backward()
    assert dense.grad is not None
    assert dense.grad.abs().sum() > 0
    torch.testing.assert_close(host.decode(host.on_manifold(dense)), host.decode(dense))
    if host.spec.manifold != "none":
        torch.testing.assert_close(host.decode(3 * dense), host.decode(dense))


def test_wrong_sizes_are_refused_in_one_line(host: ImageTokenizer) -> None:
    size = host.spec.image_size
    with pytest.raises(InputError, match="resize") as error:
        host.encode(torch.zeros(1, 3, size + 1, size))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="dense tokens"):
        host.decode(torch.zeros(1, host.spec.grid.length + 1, host.spec.code_dim))


def test_tiny_is_tiny_and_reproducible(host: ImageTokenizer) -> None:
    assert sum(p.numel() * p.element_size() for p in host.state_dict().values()) < 2**20
    state = torch.random.get_rng_state()
    assert fingerprint(type(host).tiny()) == fingerprint(host)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_is_the_same_host(
    host: ImageTokenizer, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    save_tokenizer(host, tmp_path, dtype=dtype)
    found = load_tokenizer(tmp_path)
    assert type(found) is type(host)
    assert found.spec == host.spec
    assert fingerprint(found) == fingerprint(host)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    if dtype is None:
        assert torch.equal(found.encode(images(host)), host.encode(images(host)))


def test_by_name_with_and_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    other = ToySingle(seed=5, columns=4)
    save_safetensors(other.state_dict(), path)
    found = load_tokenizer("toy_single(columns=4)", path)
    assert fingerprint(found) == fingerprint(other)
    assert fingerprint(load_tokenizer("toy_single(columns=4)")) != fingerprint(other)
    with pytest.raises(CheckpointError, match=r"does not fit ToyMulti"):
        load_tokenizer("toy_multi", path)
    with pytest.raises(InputError, match="Did you mean 'toy_single'"):
        load_tokenizer("toy_singel")
    with pytest.raises(CheckpointError, match=r"fetch tokenizer\.safetensors"):
        load_tokenizer("nobody/nothing")
    save_tokenizer(other, tmp_path)
    with pytest.raises(InputError, match="already holds weights"):
        load_tokenizer(tmp_path, path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(CheckpointError, match="holds no unicompress-tokenizer-1"):
        load_tokenizer(tmp_path)
    save_tokenizer(ToySingle(), tmp_path)
    tensors, notes = load_safetensors(tmp_path / "tokenizer.safetensors")
    notes["options"] = '{"depth": 3}'
    save_safetensors(tensors, tmp_path / "tokenizer.safetensors", notes)
    with pytest.raises(CheckpointError, match="option 'depth', which toy_single does not have"):
        load_tokenizer(tmp_path)


def test_residual_codes_add_up_and_each_takes_what_is_left() -> None:
    host = ToyResidual.tiny()
    tokens = torch.randn(1, 5, host.spec.dim, dtype=torch.float64)
    entries = host.entries.detach().double()
    codes, _ = host.double().quantize(tokens)
    for place in range(5):
        rest = tokens[0, place].clone()
        for depth in range(4):
            wanted = (entries[depth] - rest).square().sum(-1).argmin()
            assert codes[0, place, depth] == wanted
            rest -= entries[depth, wanted]


def test_chunks_are_quantized_apart() -> None:
    host = ToyMulti.tiny()
    tokens = torch.randn(1, 3, host.spec.dim)
    changed = tokens.clone()
    changed[..., 2:4] *= -1  # the second chunk of two channels
    codes, others = host.quantize(tokens)[0], host.quantize(changed)[0]
    assert torch.equal(codes[..., [0, 2, 3, 4, 5, 6, 7]], others[..., [0, 2, 3, 4, 5, 6, 7]])
    assert not torch.equal(codes[..., 1], others[..., 1])


def test_toy_options_are_checked() -> None:
    with pytest.raises(InputError, match="codebook_size must be at least 2"):
        ToySingle(codebook_size=1)
    assert str(ToySingle(rows=2)) == "toy_single(rows=2, columns=6, codebook_size=16, seed=0)"
