"""Probes read what is in the tokens, and do not read what is not."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.data.images import to_tensor
from unicompress.data.scene_render import COLOURS, PALETTE, SHAPES
from unicompress.data.scenes import Scenes
from unicompress.errors import InputError
from unicompress.evals.probe import (
    ABSENT,
    COMPRESSED,
    DENSE,
    LOCALS,
    Probe,
    fields_of,
    main,
    run_probe,
    score,
    truth,
)
from unicompress.tokenizers.io import save_tokenizer
from unicompress.tokenizers.janus_vq import JanusVQ

SMALL = {
    "image_size": 32,
    "patch": 2,
    "base_channels": 32,
    "channel_multiplier": (1, 1),
    "latent_channels": 16,
    "code_dim": 4,
    "codebook_size": 16,
    "res_blocks": 1,
}
HOST = JanusVQ(**SMALL)
CODEC = ImageCodec(HOST, CodecSpec(width=16, heads=2, depth=1, global_count=2))


def test_truth_names_the_shape_of_every_colour() -> None:
    scene = Scenes("test")[0].scene
    row = truth([scene])[0]
    assert {(COLOURS[i], SHAPES[k]) for i, k in enumerate(row.tolist()) if k != ABSENT} == {
        (thing.colour, thing.shape) for thing in scene.objects
    }


def test_score_counts_scenes_objects_and_held_out_pairs() -> None:
    wanted = torch.full((2, len(COLOURS)), ABSENT)
    red, yellow = COLOURS.index("red"), COLOURS.index("yellow")
    wanted[0, red] = SHAPES.index("square")
    wanted[1, red], wanted[1, yellow] = SHAPES.index("cross"), SHAPES.index("circle")  # held out
    logits = nn.functional.one_hot(wanted, ABSENT + 1).float()
    assert (score(logits, wanted).colours.mean, score(logits, wanted).shapes.mean) == (1, 1)
    logits[1, yellow] = logits[1, yellow].roll(1)  # another shape, but still one
    logits[0, COLOURS.index("blue")] = torch.eye(ABSENT + 1)[0]  # a colour that is not there
    found = score(logits, wanted)
    assert found.colours.mean == 0.5
    assert found.shapes.mean == pytest.approx(2 / 3)
    assert found.held_out is not None
    assert (found.held_out.mean, found.held_out.count) == (0.5, 2)


class Told(JanusVQ):
    """A tokenizer whose tokens say how much of each colour of the palette they hold."""

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        palette = torch.tensor(list(PALETTE.values())) / 127.5 - 1
        near = torch.cdist(pixels.permute(0, 2, 3, 1), palette) < 0.3  # [b, h, w, colours]
        shares = nn.functional.avg_pool2d(near.float().permute(0, 3, 1, 2), 4)
        return 3 * shares.flatten(2).transpose(1, 2)


class Blind(JanusVQ):
    """A tokenizer whose tokens say nothing."""

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        return torch.ones(len(pixels), self.spec.grid.length, 3)


def learned(kind: type[JanusVQ]) -> float:
    """The loss that a probe reaches on 16 scenes that it sees again and again."""
    torch.manual_seed(0)
    samples = [Scenes("train", size=32)[index] for index in range(16)]
    pixels = torch.stack([to_tensor(sample.pixels) for sample in samples])
    field = fields_of(kind(**SMALL), None, pixels)[DENSE]
    probe = Probe(field.locals_.shape[-1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    wanted = truth([sample.scene for sample in samples])
    for _ in range(90):
        loss = nn.functional.cross_entropy(probe(field).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_reads_what_is_there_and_nothing_else() -> None:
    assert learned(Told) < 0.5
    assert learned(Blind) > 0.8


def test_repeats_itself_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = (run_probe(HOST, CODEC, images=64, pictures=8) for _ in range(2))
    assert first == second
    assert list(first) == [DENSE, COMPRESSED, LOCALS]
    assert torch.equal(state, torch.get_rng_state())


def test_fields_are_those_that_understanding_reads() -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    fields = fields_of(HOST, CODEC, pixels)
    tokens = CODEC.compress(HOST.encode(pixels))
    joined = torch.cat([fields[COMPRESSED].globals_, fields[COMPRESSED].locals_], dim=1)
    assert torch.equal(joined, tokens.sequence)
    assert fields[LOCALS].globals_.shape[1] == 0


def test_command_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(HOST.freeze(), tmp_path / "host")
    CODEC.save_pretrained(tmp_path / "codec")
    words = [str(tmp_path / "host"), str(tmp_path / "codec"), "--images", "32", "--pictures", "4"]
    assert main([*words, "--json", str(tmp_path / "a.json")]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["compressed"]["tokens_per_image"] == CODEC.spec.global_count + 16
    assert set(content["details"]["probe"]) == {DENSE, COMPRESSED, LOCALS}
    typed = shlex.join([*words, "--json", str(tmp_path / "a.json")])
    assert content["command"] == f"python -m unicompress.evals.probe {typed}"
    assert f"{LOCALS}: colours" in capsys.readouterr().out
    assert main([str(tmp_path / "none"), "--json", str(tmp_path / "b.json")]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("images", "pictures"), [(31, 8), (64, 1)])
def test_too_little_is_refused(images: int, pictures: int) -> None:
    with pytest.raises(InputError, match="a probe needs at least 32 images and 2 pictures"):
        run_probe(HOST, CODEC, images=images, pictures=pictures)
