"""The command line, end to end on tiny models, and everything a user can get wrong."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from eval_pair import SIDE, SPEC, tiny_pair
from saved_pair import save_tiny_pair
from unicompress import __version__, cli
from unicompress.checkpoint import load_safetensors, save_safetensors
from unicompress.cli.options import PANELS
from unicompress.codec import ImageCodec
from unicompress.data.images import load_image, save_png, to_tensor
from unicompress.data.scenes import Scenes
from unicompress.evals.language_models import random_pair
from unicompress.unified import UnifiedModel

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
FROZEN = {
    "demo": {"--out", "--dense", "--compressed", "--device", "--json"},
    "train": {"stage", "recipe", "overrides", "--resume", "--dry-run", "--json"},
    "encode": {
        "images", "--output", "--model", "--stride", "--global-count", "--device", "--json",
    },
    "decode": {"file", "--output", "--model", "--device", "--json"},
    "ask": {"image", "question", "--model", "--device", "--json"},
    "describe": {"image", "--model", "--device", "--json"},
    "draw": {
        "prompt", "--output", "--cfg", "--temperature", "--top-k", "--top-p", "--seed", "--count",
        "--model", "--device", "--json",
    },
    "evaluate": {
        "model", "--task", "--dense", "--limit", "--seed", "--device", "--json",
    },
    "bench": {
        "what", "--lm", "--tokenizer", "--stride", "--global-count", "--order", "--head", "--dense",
        "--compressed", "--batch", "--cfg", "--repeats", "--dtype", "--engine", "--janus",
        "--counts", "--processor-time", "--plot", "--device", "--json",
    },
    "plan": {
        "--lm", "--tokenizer", "--model", "--stride", "--global-count", "--order", "--head",
        "--batch", "--cfg", "--dtype", "--processor-time", "--device", "--json",
    },
    "pack": {"recipe", "overrides", "--output", "--count", "--shard", "--device", "--json"},
    "export": {"output", "--model", "--json"},
}  # fmt: skip
FIXED = {
    "tokens_per_image", "interface_tokens", "understanding_accuracy", "generation_accuracy", "psnr",
    "generation_seconds", "understanding_seconds", "training_step_seconds", "kv_cache_bytes",
}  # fmt: skip
RATIOS = {
    "tokens", "generation_seconds", "understanding_seconds", "training_step_seconds",
    "kv_cache_bytes",
}  # fmt: skip
PARTS = {"prefill", "lm_steps", "head", "decompressor", "image_decoder"}

Shell = Callable[..., Any]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved models, a picture they can read, and its neighbours."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_pair(folder)
    save_png(Scenes("test", size=SIDE)[0].pixels, folder / "picture.png")
    save_png(Scenes("test", size=SIDE)[1].pixels, folder / "other.png")
    return folder


@pytest.fixture
def shell(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs a command in an empty folder; `$H` in its words is where the models lie."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Any:
        arguments = [str(word).replace("$H", str(home)) for word in words]
        return CliRunner().invoke(cli.app, arguments)

    return run


def succeeded(result: Any) -> str:
    assert result.exit_code == 0, f"{result.output}{result.stderr}{result.exception}"
    return result.stdout


def refused(result: Any, *parts: str) -> None:
    """Exit code 2 and one line on stderr that names what is wrong."""
    said = result.stderr
    assert result.exit_code == 2, result.output
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said + result.output
    for part in parts:
        assert part in said


def values(path: Path | str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


# The three uses, and files of codes


def test_encode_and_decode(shell: Shell, home: Path) -> None:
    model = ("--model", "$H/compressed")
    said = succeeded(
        shell("encode", "$H/picture.png", "$H/other.png", "-o", "x.uct", *model, "--json", "e.json")
    )
    assert "2 images of 20 tokens (dense: 64)" in said
    encoded = values("e.json")
    assert encoded["tokens_per_image"] == 20
    assert encoded["names"] == ["picture", "other"]
    assert encoded["bytes"] == Path("x.uct").stat().st_size
    loaded = UnifiedModel.from_pretrained(home / "compressed")
    assert isinstance(loaded.codec, ImageCodec)
    pixels = to_tensor(load_image(home / "picture.png", SIDE))[None]
    codes = loaded.codec.encode(pixels)
    assert encoded["codes"][0] == codes[0].tolist()

    succeeded(shell("decode", "x.uct", "-o", "back", *model, "--json", "d.json"))
    assert values("d.json")["images"] == ["back/picture.png", "back/other.png"]
    found = to_tensor(load_image("back/picture.png"))
    torch.testing.assert_close(found, loaded.codec.decode(codes)[0], atol=1 / 127, rtol=0)


def test_a_dense_model_keeps_its_own_codes(shell: Shell) -> None:
    model = ("--model", "$H/dense")
    succeeded(shell("encode", "$H/picture.png", "-o", "x.uct", *model, "--json", "e.json"))
    assert values("e.json")["tokens_per_image"] == 64
    succeeded(shell("decode", "x.uct", "-o", "back", *model))
    assert Path("back/picture.png").is_file()


def test_the_rate_is_chosen_per_call(shell: Shell) -> None:
    rate = ("--global-count", 0, "--json", "e.json")
    succeeded(shell("encode", "$H/picture.png", "-o", "x.uct", "--model", "$H/compressed", *rate))
    assert values("e.json")["tokens_per_image"] == 16
    succeeded(shell("decode", "x.uct", "-o", "back", "--model", "$H/compressed"))


@pytest.mark.parametrize("side", ["dense", "compressed"])
def test_ask_and_describe(shell: Shell, home: Path, side: str) -> None:
    model = ("--model", f"$H/{side}", "--json", "a.json")
    said = succeeded(shell("ask", "$H/picture.png", "how many objects are there?", *model))
    answer = values("a.json")
    assert said == answer["answer"] + "\n"
    pixels = to_tensor(load_image(home / "picture.png", SIDE))[None]
    loaded = UnifiedModel.from_pretrained(home / side)
    assert [answer["answer"]] == loaded.answer(pixels, ["how many objects are there?"])
    assert answer["tokens_per_image"] == {"dense": 64, "compressed": 20}[side]
    assert answer["interface_tokens"] == {"dense": 66, "compressed": 23}[side]

    said = succeeded(shell("describe", "$H/picture.png", *model))
    assert values("a.json")["description"] == said.removesuffix("\n")


def test_draw_depends_on_its_seed(shell: Shell) -> None:
    model = ("--model", "$H/compressed")
    succeeded(shell("draw", "a red circle", "-o", "a.png", *model, "--seed", 3, "--cfg", 1.5))
    options = ("--seed", 2, "--count", 2, "--cfg", 1.5, "--json", "d.json")
    said = succeeded(shell("draw", "a red circle", "-o", "b/b.png", *model, *options))
    assert said.split() == ["b/b-0.png", "b/b-1.png"]
    assert Path("a.png").read_bytes() == Path("b/b-1.png").read_bytes()
    assert Path("a.png").read_bytes() != Path("b/b-0.png").read_bytes()
    drawn = values("d.json")
    assert drawn["seeds"] == [2, 3]
    assert drawn["images"] == ["b/b-0.png", "b/b-1.png"]


def test_draw_takes_its_sampling_options(shell: Shell) -> None:
    options = ("--temperature", 0, "--top-k", 5, "--top-p", 0.9)
    one, two = ("draw", "a", "-o", "1.png"), ("draw", "a", "-o", "2.png", "--seed", 9)
    for words in (one, two):
        succeeded(shell(*words, "--model", "$H/compressed", *options))
    assert Path("1.png").read_bytes() == Path("2.png").read_bytes()  # temperature 0: no chance


# Measuring


def has_fixed_shape(path: str) -> dict[str, Any]:
    found = values(path)
    assert found["schema"] == 1
    assert {"commit", "hardware", "seeds", "dense", "compressed", "ratio"} <= set(found)
    assert set(found["dense"]) >= FIXED
    assert set(found["compressed"]) >= FIXED
    assert set(found["ratio"]) >= RATIOS
    assert set(found["breakdown"]["compressed"]) >= PARTS
    assert set(found["breakdown"]["dense"]) >= PARTS
    return found


PAIR = ("--dense", "$H/dense", "--compressed", "$H/compressed")


def test_evaluate_compares_with_the_dense_model(shell: Shell) -> None:
    words = ("--task", "understanding", "--limit", 6, "--json", "r.json")
    said = succeeded(shell("evaluate", "$H/compressed", "--dense", "$H/dense", *words))
    assert "understanding accuracy" in said
    found = has_fixed_shape("r.json")
    assert 0 <= found["dense"]["understanding_accuracy"] <= 1
    assert found["dense"]["generation_accuracy"] is None
    assert found["ratio"]["tokens"] == pytest.approx(20 / 64)


@pytest.mark.parametrize("task", ["generation", "reconstruction"])
def test_evaluate_one_model(shell: Shell, task: str) -> None:
    words = ("--task", task, "--limit", 2, "--json", "r.json")
    succeeded(shell("evaluate", "$H/compressed", *words))
    found = has_fixed_shape("r.json")
    measured = {"generation": "generation_accuracy", "reconstruction": "psnr"}[task]
    assert found["compressed"][measured] is not None
    assert found["dense"][measured] is None


@pytest.mark.parametrize("what", ["generation", "understanding", "training", "decompressor"])
def test_bench(shell: Shell, what: str) -> None:
    effort = ("--batch", 1, "--repeats", 1, "--json", "r.json")
    succeeded(shell("bench", what, *PAIR, *effort))
    found = has_fixed_shape("r.json")
    figure = {"training": "training_step_seconds"}.get(what, f"{what}_seconds")
    if what != "decompressor":
        ratio = found["compressed"][figure] / found["dense"][figure]
        assert found["ratio"][figure] == pytest.approx(ratio)
    else:
        assert found["breakdown"]["compressed"]["decompressor"] > 0


def test_bench_of_a_language_model_by_name(shell: Shell) -> None:
    effort = ("--batch", 1, "--repeats", 1, "--json", "r.json")
    succeeded(shell("bench", "understanding", "--lm", "tiny", *PAIR[2:], *effort))
    assert has_fixed_shape("r.json")["ratio"]["understanding_seconds"] > 0


def test_export_writes_a_plain_language_model(shell: Shell) -> None:
    from transformers import AutoModelForCausalLM

    words = ("export", "plain", "--model", "$H/compressed", "--json", "x.json")
    succeeded(shell(*words))
    plain = AutoModelForCausalLM.from_pretrained("plain")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert values("x.json")["folder"] == "plain"


# Training

RECIPE = """
out: run
steps: 2
batch: 2
lr: 1e-3
validate_images: 2
tensorboard: false
cpu: true
tokenizer:
  name: janus_vq
  options: {image_size: 32, patch: 4, latent_channels: 32, codebook_size: 16}
"""


def test_train_and_resume(shell: Shell) -> None:
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    words = ("train", "tokenizer", "recipe.yaml", "batch=3", "--json", "t.json")
    succeeded(shell(*words))
    trained = values("t.json")
    assert (trained["stage"], trained["status"], trained["step"]) == ("tokenizer", "done", 2)
    assert any(Path("run/final").iterdir())
    succeeded(shell(*words, "--resume"))


def test_stages_are_those_of_the_library() -> None:
    from unicompress.cli import bench, evaluate, train
    from unicompress.evals.cost import BENCHES
    from unicompress.evals.experiment import ALL, TASKS
    from unicompress.training.run import STAGES

    assert [stage.value for stage in train.Stage] == list(STAGES)
    assert {cost.value for cost in bench.Cost} == set(BENCHES)
    assert {task.value for task in evaluate.Task} == {ALL, *TASKS}


# Mistakes


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size, up to where its pixels would stand."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\x40\0IDAT"


BAD_IMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda whole: whole[: len(whole) // 2], "damaged or cut off"),
    "header-only": (lambda whole: whole[:45], "damaged or cut off"),
    "empty": (lambda whole: b"", "is empty (0 bytes)"),
    "text": (lambda whole: b"once upon a time" * 40, "is no image that can be read"),
    "pickle": (lambda whole: pickle.dumps({"a": 1}), "is no image that can be read"),
    "huge": (lambda whole: png_header(30_000, 30_000), "is too large"),
}


@pytest.mark.parametrize("command", ["ask", "describe", "encode"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images(shell: Shell, home: Path, command: str, kind: str) -> None:
    spoil, sentence = BAD_IMAGES[kind]
    Path("bad.png").write_bytes(spoil((home / "picture.png").read_bytes()))
    more = {"ask": ["what?"], "describe": [], "encode": ["$H/picture.png", "-o", "x.uct"]}[command]
    refused(shell(command, "bad.png", *more, "--model", "$H/compressed"), "bad.png", sentence)
    assert not Path("x.uct").exists()


def test_a_picture_of_one_pixel_is_a_picture(shell: Shell) -> None:
    save_png(np.full((1, 1, 3), 200, dtype=np.uint8), "dot.png")
    succeeded(shell("ask", "dot.png", "what?", "--model", "$H/compressed"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("ask", "none.png", "what?"), ["none.png does not exist"]),
        (("ask", "$H", "what?"), ["is a folder"]),
        (("ask", "$H/picture.png", " "), ["the question is empty"]),
        (("draw", "a", "--temperature", "-1"), ["temperature"]),
        (("draw", "a", "--temperature", "nan"), ["temperature"]),
        (("draw", "a", "--top-p", "2"), ["top_p"]),
        (("draw", "a", "--top-k", "-1"), ["top_k"]),
        (("draw", "a", "--count", "0"), ["count must be at least 1, got 0"]),
        (("draw", "a", "-o", "a.jpg"), ["a.jpg must end in .png"]),
        (("draw", "word " * 3000), ["positions"]),
        (("encode", "$H/picture.png", "-o", "x", "--stride", "3"), ["built for stride 2, got 3"]),
        (("encode", "$H/picture.png", "-o", "x", "--global-count", "9"), ["4 global tokens"]),
        (("decode", "none.uct", "-o", "x"), ["none.uct"]),
        (("decode", "$H/picture.png", "-o", "x"), ["picture.png"]),
        (("describe", "$H/picture.png", "--device", "tpu"), ["the device 'tpu' cannot be used"]),
        (("describe", "$H/picture.png", "--json", "$H"), ["$H"]),
    ],
)
def test_bad_values(shell: Shell, home: Path, words: tuple[str, ...], parts: list[str]) -> None:
    expected = [part.replace("$H", str(home)) for part in parts]
    refused(shell(*words, "--model", "$H/compressed"), *expected)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("evaluate", "$H/compressed", "--limit", "0"), ["limit must be at least 1, got 0"]),
        (("evaluate", "$H/dense", "--dense", "$H/dense"), ["--dense needs a model without"]),
        (("evaluate", "$H/dense", "--task", "singing"), ["singing", "understanding"]),
        (("bench", "generation", *PAIR, "--repeats", "0"), ["repeats"]),
        (("bench", "generation", *PAIR[2:], "--lm", "lama-3.2-1b"), ["'llama-3.2-1b'"]),
        (("demo", "--dense", "$H/compressed", "--compressed", "$H/dense"), ["demo compares"]),
        (("export", "plain", "--model", "none/such-model"), ["none/such-model"]),
        (("export", "plain", "--model", "$H/picture.png"), ["is a file"]),
        (("train", "tokenizer", "none.yaml"), ["cannot read the recipe none.yaml"]),
        (("train", "tokeniser", "none.yaml"), ["tokeniser", "stage-two"]),
        (("ask", "$H/picture.png"), ["QUESTION", "see"]),
        (("ask", "$H/picture.png", "what?", "--colour"), ["--colour"]),
        (("sing",), ["sing"]),
        (("draw", "a", "--seed", "one"), ["--seed", "integer"]),
    ],
)
def test_bad_commands(shell: Shell, words: tuple[str, ...], parts: list[str]) -> None:
    refused(shell(*words), *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("step: 3", ["unknown key step. Did you mean steps?"]),
        ("steps: -1", ["steps"]),
        ("steps: many", ["steps"]),
        ("lr: [", ["YAML"]),
        ("tokenizer: {nam: janus_vq}", ["nam", "name"]),
    ],
)
def test_bad_recipes(shell: Shell, change: str, parts: list[str]) -> None:
    key = change.split(":")[0]
    lines = [line for line in RECIPE.splitlines() if not line.startswith((f"{key}:", "  "))]
    kept = [line for line in lines if line != "tokenizer:"]
    Path("recipe.yaml").write_text("\n".join([*kept, change]), encoding="utf-8")
    refused(shell("train", "tokenizer", "recipe.yaml"), *parts)
    assert not Path("run").exists()


@pytest.mark.parametrize("override", ["steps", "=3", "stepz=3", "tokenizer.nam=x"])
def test_bad_overrides(shell: Shell, override: str) -> None:
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    refused(shell("train", "tokenizer", "recipe.yaml", override))


def spoilt(whole: bytes, how: str) -> bytes:
    middle = len(whole) * 3 // 4
    return {
        "truncated": whole[:middle],
        "bit-flipped": whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :],
        "a pickle": pickle.dumps({"weight": [1.0]}),
        "empty": b"",
    }[how]


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "a pickle", "empty"])
def test_damaged_weights(shell: Shell, home: Path, how: str) -> None:
    shutil.copytree(home / "compressed", "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(spoilt(weights.read_bytes(), how))
    refused(shell("ask", "$H/picture.png", "what?", "--model", "model"), "model.safetensors")


def test_a_pickled_model_is_never_opened(shell: Shell, home: Path) -> None:
    """Opening this file would write another; only the safetensors file is looked for."""
    shutil.copytree(home / "compressed", "model")
    Path("model/model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, "model/pytorch_model.bin")
    refused(shell("ask", "$H/picture.png", "what?", "--model", "model"), "model.safetensors")


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "a pickle", "empty"])
def test_damaged_codes(shell: Shell, how: str) -> None:
    model = ("--model", "$H/compressed")
    succeeded(shell("encode", "$H/picture.png", "-o", "x.uct", *model))
    Path("x.uct").write_bytes(spoilt(Path("x.uct").read_bytes(), how))
    refused(shell("decode", "x.uct", "-o", "back", *model), "x.uct")
    assert not Path("back").exists()


def test_codes_out_of_range(shell: Shell) -> None:
    model = ("--model", "$H/compressed")
    succeeded(shell("encode", "$H/picture.png", "-o", "x.uct", *model))
    tensors, notes = load_safetensors("x.uct")
    tensors["codes"][0, 3] = 99
    save_safetensors(tensors, "x.uct", notes)
    refused(shell("decode", "x.uct", "-o", "back", *model), "99")
    assert not Path("back").exists()


def test_codes_of_another_plug_in(shell: Shell, home: Path, tmp_path: Path) -> None:
    pair = tiny_pair()
    tokenizer = pair.any.tokenizer
    torch.manual_seed(12345)  # not the draws that made the pair at home
    other = ImageCodec(tokenizer, SPEC).eval()
    model = random_pair("tiny", tokenizer=tokenizer, codec=other).compressed
    assert model is not None
    model.save_pretrained(tmp_path / "other")
    succeeded(shell("encode", "$H/picture.png", "-o", "x.uct", "--model", "$H/compressed"))
    refused(shell("decode", "x.uct", "-o", "back", "--model", "other"), "another")
    refused(shell("decode", "x.uct", "-o", "back", "--model", "$H/dense"), "another")


def test_the_reference_is_named_where_it_is_missing(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unicompress import reference

    monkeypatch.setattr(reference, "WEIGHTS", tmp_path / "nowhere")
    refused(shell("draw", "a"), "reference model 'compressed'", "reinstall")


# The frame


def test_no_new_flags() -> None:
    found = {
        name: {
            option.opts[0] if option.opts[0].startswith("-") else option.name
            for option in sub.params
            if option.name != "help"
        }
        for name, sub in COMMANDS.items()
        if name in FROZEN
    }
    assert found == FROZEN, "put new knobs into the recipes, not on the command line"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_writes_json_and_explains_itself(shell: Shell, name: str) -> None:
    command = COMMANDS[name]
    for sub in getattr(command, "commands", {"": command}).values():  # a group has its own
        assert "--json" in {flag for option in sub.params for flag in option.opts}, sub.name
    said = succeeded(shell(name, "--help"))
    assert command.help.split(".")[0][:40] in " ".join(said.split())


def test_help_begins_with_what_a_newcomer_needs(shell: Shell) -> None:
    said = succeeded(shell("--help"))
    places = [said.index(f" {panel} ") for panel in PANELS]
    assert places == sorted(places)
    listed = typer.main.get_command(cli.app).list_commands(None)  # type: ignore[arg-type]
    assert set(listed) == set(COMMANDS)
    assert listed[0] == "demo"
    panels = [COMMANDS[name].rich_help_panel for name in listed]
    assert list(dict.fromkeys(panels)) == list(PANELS)  # every command has its place
    assert panels == sorted(panels, key=PANELS.index)


@pytest.mark.parametrize(
    "words",
    [("bench", "generation"), ("plan", "--lm", "tiny")],
    ids=["bench", "plan"],
)
def test_processor_time_is_refused_on_a_gpu(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    from unicompress.cli import options

    monkeypatch.setattr(options, "device_named", lambda name: torch.device("cuda"))
    result = shell(*words, "--processor-time")
    assert result.exit_code == 2
    assert "--processor-time sees nothing of a GPU's work" in result.stderr


@pytest.mark.parametrize(
    "words",
    [("bench", "generation"), ("analyze", "attention", "none")],
    ids=["bench", "analyze"],
)
def test_a_plot_that_cannot_be_written_is_refused_first(
    shell: Shell, words: tuple[str, ...]
) -> None:
    result = shell(*words, "--plot", "a.pdf")
    assert result.exit_code == 2
    assert result.stderr == "error: a.pdf must end in .png: that is the format written\n"


def test_version_and_help(shell: Shell) -> None:
    assert succeeded(shell("--version")) == f"unicompress {__version__}\n"
    assert "stage-one" in succeeded(shell("--help"))
    assert "Usage" in succeeded(shell())


def test_debug_shows_the_traceback(shell: Shell) -> None:
    result = shell("ask", "none.png", "what?", "--model", "$H/compressed", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: none.png does not exist")


def test_interruption_has_its_exit_code(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicompress.cli import use

    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(use, "load_model", interrupted)
    result = shell("describe", "$H/picture.png")
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n"


def test_a_bug_of_ours_is_not_dressed_up(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicompress.cli import use

    def broken(*words: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(use, "load_model", broken)
    result = shell("describe", "$H/picture.png")
    assert isinstance(result.exception, ZeroDivisionError)


def test_the_installed_way_of_calling(home: Path, tmp_path: Path) -> None:
    """A process of its own: nothing but the one line on stderr, nothing on stdout."""
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "unicompress",
            "ask",
            str(tmp_path / "bad.png"),
            "what?",
            "--model",
            str(home / "compressed"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
