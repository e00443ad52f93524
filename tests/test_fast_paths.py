"""Every fast path gives the tokens of the plain one, under greedy choice and under a fixed seed."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unicompress import decompressors
from unicompress.codec import CodecSpec
from unicompress.decompressors import Decompressor
from unicompress.engine import ENGINES, current_engine, repeat, use_engine
from unicompress.errors import InputError
from unicompress.layers import CrossStack
from unicompress.tokens import Grid
from unified_toy import LONG, SEPARATE, SPEC, tiny_model

PROMPTS = ["a red circle", "", LONG]
NO_GLOBALS = CodecSpec(stride=4, global_count=0, width=32)


def stack(fixed: bool) -> tuple[Tensor, Tensor]:
    """Five positions through a stack, at once and one by one."""
    torch.manual_seed(0)
    blocks = CrossStack(16, 4, 2).double()
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens, memory = torch.randn(3, 5, 16).double(), torch.randn(3, 4, 16).double()
    keys = blocks.keys_values(memory)
    decoder = blocks.decoder(keys, tokens, 5, fixed=fixed)
    places = [torch.tensor([i]) for i in range(5)] if fixed else range(5)
    steps = [decoder.step(tokens[:, i : i + 1], place) for i, place in enumerate(places)]
    return torch.cat(steps, dim=1), blocks(tokens, keys, causal=True)


@pytest.mark.parametrize("fixed", [False, True])
def test_steps_through_a_stack_are_the_whole_pass(fixed: bool) -> None:
    torch.testing.assert_close(*stack(fixed))


def test_a_step_beyond_the_cache_is_refused() -> None:
    like = torch.zeros(1, 1, 8)
    blocks = CrossStack(8, 2, 1)
    decoder = blocks.decoder(blocks.keys_values(like), like, 1)
    with pytest.raises(InputError, match="the cache holds 1 positions, 2 are needed"):
        decoder.step(like, 1)


CASES = [*itertools.product(["raster", "block"], ["codes", "regression"], [1, 4])]


@pytest.mark.parametrize(("order", "head", "chunks"), CASES)
def test_decompressing_with_fixed_shapes_gives_the_plain_tokens(
    order: str, head: str, chunks: int
) -> None:
    torch.manual_seed(0)
    grid, size = Grid(3, 5), 7  # an odd edge: some children are not there
    tables = torch.randn(chunks, size, 2).double()
    module = Decompressor(
        code_dim=2 * chunks,
        codes_per_token=chunks,
        codebook_size=size,
        order=order,
        head=head,
        width=16,
        depth=2,
        heads=2,
    ).double()
    given = torch.randn(2, 3, 2 * chunks).double(), torch.randn(2, 6, 2 * chunks).double()

    def embed(codes: Tensor) -> Tensor:
        return tables[torch.arange(chunks), codes].flatten(-2)

    def run(engine: str, temperature: float, use_cache: bool = True) -> decompressors.Decompressed:
        draws = torch.Generator().manual_seed(3)
        options = {"generator": draws, "temperature": temperature, "use_cache": use_cache}
        with use_engine(engine):
            return module.generate(*given, grid, 2, embed, **options)

    for temperature in (0.0, 1.5):
        plain = run("eager", temperature, use_cache=False)
        for engine in ("eager", "fixed"):
            fast = run(engine, temperature)
            torch.testing.assert_close(fast.dense, plain.dense)
            if plain.codes is not None:
                assert torch.equal(fast.codes, plain.codes)
        assert plain.steps == {"raster": 15, "block": 6}[order]


@pytest.mark.parametrize(
    ("host", "spec", "cfg"),
    [
        ("toy_single", None, 2.0),
        ("toy_single", SEPARATE, 2.0),
        ("toy_single", NO_GLOBALS, 1.0),
        ("toy_multi", SPEC, 2.0),
    ],
)
def test_drawing_with_fixed_shapes_gives_the_plain_codes(
    host: str, spec: CodecSpec | None, cfg: float
) -> None:
    model = tiny_model(host, spec)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 12, "top_p": 0.9}):
        plain = model.draw_codes(PROMPTS, cfg=cfg, seed=5, **options)
        with use_engine("fixed"):
            assert torch.equal(model.draw_codes(PROMPTS, cfg=cfg, seed=5, **options), plain)
    assert len(plain.unique()) > 3  # it says something


def test_guidance_does_not_double_the_decompressor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = Decompressor.generate

    def counted(self: Decompressor, globals_: Tensor, *args: object, **options: object) -> object:
        seen.append(len(globals_))
        return plain(self, globals_, *args, **options)

    monkeypatch.setattr(Decompressor, "generate", counted)
    model = tiny_model("toy_single")
    model.draw(["a", "b"], cfg=3.0)
    model.draw(["a", "b"], cfg=1.0)
    assert seen == [2, 2]


def test_cross_keys_are_computed_once_and_codes_looked_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("toy_single")
    codes = model.draw_codes(["a"])
    calls: list[str] = []
    for owner, name in ((CrossStack, "keys_values"), (type(model.tokenizer), "embed")):
        plain = getattr(owner, name)

        def counted(self: object, *args: object, _plain=plain, _name=name) -> object:
            calls.append(_name)
            return _plain(self, *args)

        monkeypatch.setattr(owner, name, counted)
    model.codec.decompress(codes)
    assert calls.count("keys_values") == 1
    # Two streams of compressed codes, the table of all codes, and the result; none per step.
    assert calls.count("embed") == 4


def test_the_engine_is_that_of_the_block() -> None:
    assert current_engine() == "eager"
    with use_engine("fixed"):
        assert current_engine() == "fixed"
        with use_engine("eager"):
            assert current_engine() == "eager"
    assert current_engine() == "eager"
    with pytest.raises(InputError, match="engine must be one of eager, fixed, compile, graph"):
        use_engine("warp").__enter__()


def test_graphs_need_their_device() -> None:
    model = tiny_model("toy_single")
    with use_engine("graph"), pytest.raises(InputError, match="needs a CUDA device, got cpu"):
        model.draw(["a"])


def test_a_step_runs_as_often_as_asked() -> None:
    count = torch.zeros(())
    for engine in ("eager", "fixed"):
        with use_engine(engine):
            repeat(lambda: count.add_(1), 5, count.device)
    assert int(count) == 10


@pytest.mark.slow
def test_compiled_drawing_gives_the_plain_picture() -> None:
    """In a process of its own: a compiler cannot see through the checks of shapes in tests."""
    code = """
import torch
from unicompress.engine import use_engine
from unified_toy import tiny_model
model = tiny_model("toy_single")
plain = model.draw_codes(["a red circle"], temperature=0)
dense = model.codec.decompress(plain)
with use_engine("compile"):
    assert torch.equal(model.draw_codes(["a red circle"], temperature=0), plain)
    torch.testing.assert_close(model.codec.decompress(plain), dense)
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_on_a_gpu_every_engine_draws_the_same(engine: str) -> None:
    model = tiny_model("toy_single").to("cuda")
    options = {"cfg": 2.0, "seed": 5}
    plain = model.draw_codes(PROMPTS, **options)
    with use_engine(engine):
        assert torch.equal(model.draw_codes(PROMPTS, **options), plain)
        torch.testing.assert_close(model.codec.decompress(plain), _eagerly(model, plain))


def _eagerly(model: object, codes: Tensor) -> Tensor:
    with use_engine("eager"):
        return model.codec.decompress(codes)  # type: ignore[attr-defined]
