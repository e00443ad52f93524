"""Evaluations against models that know everything, nothing, or only the question."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval_pair import SIDE, SPEC, tiny_pair
from unicompress import reference
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.data.scenes import Scenes
from unicompress.errors import CheckpointError, InputError
from unicompress.evals import result as results
from unicompress.evals.experiment import Amount, evaluate_model
from unicompress.evals.generation import (
    draw_all,
    evaluate_generation,
    real_pictures,
    score_drawings,
    unseen_scenes,
)
from unicompress.evals.reconstruction import (
    DECOMPRESSED,
    HOST,
    NEAREST,
    evaluate_reconstruction,
    nearest_expansion,
    reconstruct,
)
from unicompress.evals.result import Breakdown, Figures, Result, plain
from unicompress.evals.understanding import QuestionSet, ask_all, evaluate_understanding
from unicompress.tokenizers.toy import ToySingle
from unicompress.tokens import Grid


def questions(count: int = 60) -> QuestionSet:
    return QuestionSet.scenes(count, size=SIDE)


class Oracle:
    """Knows every picture of a question set by heart, and nothing else."""

    def __init__(self, tests: QuestionSet):
        self.known: dict[bytes, dict[str, str]] = {}
        self.seen: list[list[str]] = []
        for owner, question in zip(tests.owners, tests.questions, strict=True):
            key = tests.pixels([owner])[0].numpy().tobytes()
            self.known.setdefault(key, {})[question.text] = question.answer

    def answer(self, images: Tensor, questions: list[list[str]]) -> list[list[str]]:
        self.seen += questions
        return [
            [self.known.get(image.numpy().tobytes(), {}).get(text, "") for text in asked]
            for image, asked in zip(images, questions, strict=True)
        ]


class Constant:
    """Says the same to every question."""

    def answer(self, images: Tensor, questions: list[list[str]]) -> list[list[str]]:
        return [["Yes "] * len(asked) for asked in questions]


class Painter:
    """Draws a list of pictures, one after the other."""

    def __init__(self, pictures: Tensor):
        self.left = list(pictures)

    def draw(
        self,
        prompts: list[str],
        *,
        cfg: float,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> Tensor:
        return torch.stack([self.left.pop(0) for _ in prompts])


# Questions


def test_a_question_set_holds_the_scenes_of_its_split() -> None:
    tests, data = questions(20), Scenes("test", size=SIDE)
    assert len(tests.questions) == len(tests.owners) == 20
    assert tests.owners == tuple(sorted(tests.owners))
    for index, picture in enumerate(tests.pictures):
        assert np.array_equal(picture, data[index].pixels)
        assert tests.held_out[index] == data[index].scene.has_held_out
    assert tests.questions[0] == data[0].questions[0]


def test_a_model_that_knows_the_pictures_is_right_only_with_them() -> None:
    tests = questions()
    score = evaluate_understanding(Oracle(tests), tests, batch=3)
    assert score.accuracy.overall.mean == 1.0
    assert all(interval.mean == 1.0 for interval in score.accuracy.by_kind.values())
    assert score.question_only is not None
    assert score.question_only.overall.mean == 0.0
    assert score.shuffled_image is not None
    assert score.shuffled_image.overall.mean < 0.3  # the same text may stand by chance elsewhere
    assert score.summary()["correct"] == "1" * len(tests.questions)


def test_a_model_that_does_not_look_is_unmasked() -> None:
    tests = questions(240)
    score = evaluate_understanding(Constant(), tests)
    assert score.question_only is not None
    assert score.question_only.overall == score.accuracy.overall
    assert score.accuracy.by_kind["exists"].mean == pytest.approx(0.5, abs=0.2)
    assert score.accuracy.by_kind["colour"].mean == 0.0
    parts = [score.seen, score.held_out]
    assert sum(part.count for part in parts if part) == 240


def test_the_shuffled_picture_is_always_another_one() -> None:
    tests = questions(30)
    given: list[bytes] = []

    class Spy(Constant):
        def answer(self, images: Tensor, questions: list[list[str]]) -> list[list[str]]:
            given.extend(image.numpy().tobytes() for image in images)
            return super().answer(images, questions)

    evaluate_understanding(Spy(), tests, batch=4)
    count = len(tests.pictures)
    own, blank, other = given[:count], given[count : 2 * count], given[2 * count :]
    assert len(set(blank)) == 1
    assert all(first != second for first, second in zip(own, other, strict=True))
    assert sorted(own) == sorted(other)


def test_answers_do_not_depend_on_the_batch() -> None:
    tests = questions(14)
    for _, model in tiny_pair():
        assert ask_all(model, tests, batch=1) == ask_all(model, tests, batch=8)


def test_pairing_needs_the_same_questions() -> None:
    first, second = (
        evaluate_understanding(Constant(), questions(n), baselines=False) for n in (6, 7)
    )
    assert first.question_only is None
    assert first.compared_with(first).difference == 0
    with pytest.raises(InputError, match="same questions"):
        first.compared_with(second)


def test_no_questions_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        QuestionSet.scenes(0)


def test_easy_vqa_questions_are_counted() -> None:
    pytest.importorskip("easy_vqa")
    tests = QuestionSet.easy_vqa(25, size=SIDE)
    assert len(tests.questions) == 25
    assert tests.pictures[0].shape == (SIDE, SIDE, 3)
    assert not any(tests.held_out)


# Drawings


def test_the_real_pictures_are_perfect_drawings() -> None:
    samples = unseen_scenes(12, size=64)
    others = unseen_scenes(12, size=64, first=100)
    painter = Painter(real_pictures(samples))
    score = evaluate_generation(painter, samples, others=others, batch=5)
    assert score.whole.mean == 1.0
    assert all(interval.mean == 1.0 for interval in score.attributes.values())
    assert score.fid == pytest.approx(0, abs=1e-6)
    assert score.fid_floor is not None
    assert score.fid_floor > 0.0
    assert score.held_out is not None
    assert score.held_out.count == 3  # every fourth scene


def test_other_pictures_are_not() -> None:
    samples = unseen_scenes(12, size=64)
    score = score_drawings(real_pictures(samples).roll(1, 0), samples)
    assert score.whole.mean < 0.2
    assert score.compared_with(score).difference == 0
    assert score.fid_floor is None


def test_a_drawing_depends_on_its_own_seed_only() -> None:
    model = tiny_pair().compressed
    assert model is not None
    prompts = [sample.caption for sample in unseen_scenes(5, size=SIDE)]
    together = draw_all(model, prompts, batch=5)
    assert together.shape == (5, 3, SIDE, SIDE)
    torch.testing.assert_close(draw_all(model, prompts, batch=2), together, atol=1e-4, rtol=0)
    assert not torch.equal(draw_all(model, prompts, seed=9), together)


def test_nothing_to_draw_is_refused() -> None:
    model = tiny_pair().dense
    assert model is not None
    with pytest.raises(InputError, match="nothing to draw"):
        draw_all(model, [])


# Reconstructions


def test_reconstructions_of_every_way_are_scored() -> None:
    model = tiny_pair().compressed
    assert model is not None
    samples = unseen_scenes(4, size=SIDE)
    scores = evaluate_reconstruction(
        model.tokenizer, model.codec, samples, batch=3, similarity=False
    )
    assert set(scores) == {HOST, DECOMPRESSED, NEAREST}
    assert scores[HOST].token_accuracy == 1.0
    assert scores[NEAREST].token_accuracy is not None
    assert 0 <= scores[NEAREST].token_accuracy < 1
    assert all(np.isfinite(score.psnr.mean) for score in scores.values())
    plain(scores[DECOMPRESSED].summary())


def test_the_identity_codec_reconstructs_what_the_host_does() -> None:
    tokenizer = ToySingle(rows=8, columns=8)
    codec = ImageCodec(tokenizer, CodecSpec(stride=1, global_count=0)).eval()
    made = reconstruct(tokenizer, codec, real_pictures(unseen_scenes(3, size=SIDE)))
    assert torch.equal(made.pictures[DECOMPRESSED], made.pictures[HOST])
    assert torch.equal(made.pictures[NEAREST], made.pictures[HOST])
    assert made.token_accuracy == {HOST: 1.0, DECOMPRESSED: 1.0, NEAREST: 1.0}


def test_nearest_expansion_repeats_every_local_token_over_its_cell() -> None:
    tokenizer = ToySingle(rows=3, columns=5)
    codec = ImageCodec(tokenizer, SPEC).eval()
    dense = torch.randn(2, 15, tokenizer.spec.dim)
    tokens = codec.compress(dense, grid=Grid(3, 5))
    _, rows = codec.quantize(tokens)
    field = nearest_expansion(codec, tokens).unflatten(1, (3, 5))
    for row in range(3):
        for column in range(5):
            local = rows[:, 4 + (row // 2) * 3 + column // 2]
            assert torch.equal(field[:, row, column], local)


# Whole evaluations and their JSON

KEYS = {
    "schema",
    "commit",
    "command",
    "hardware",
    "seeds",
    "dense",
    "compressed",
    "ratio",
    "breakdown",
}
FIGURES = {
    "tokens_per_image", "interface_tokens", "understanding_accuracy", "generation_accuracy", "psnr",
    "generation_seconds", "understanding_seconds", "training_step_seconds", "kv_cache_bytes",
}  # fmt: skip
RATIO = {
    "tokens",
    "generation_seconds",
    "understanding_seconds",
    "training_step_seconds",
    "kv_cache_bytes",
}
PARTS = {"prefill", "lm_steps", "head", "decompressor", "image_decoder"}
FEW = Amount(questions=12, easy_vqa=8, prompts=3, pictures=3, similarity=False)


def check_shape(value: dict) -> None:  # type: ignore[type-arg]
    assert value["schema"] == 1
    assert set(value) >= KEYS
    for side in ("dense", "compressed"):
        assert set(value[side]) == FIGURES
        assert set(value["breakdown"][side]) == PARTS
    assert set(value["ratio"]) == RATIO


def test_everything_is_evaluated_on_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    dense, compressed = tiny_pair().dense, tiny_pair().compressed
    assert dense is not None
    assert compressed is not None
    told: list[str] = []
    found = evaluate_model(
        compressed, against=dense, amount=FEW, progress=lambda label, done, of: told.append(label)
    )
    found.write(tmp_path / "out" / "result.json")
    value = json.loads((tmp_path / "out" / "result.json").read_text())
    check_shape(value)
    assert (value["dense"]["tokens_per_image"], value["compressed"]["tokens_per_image"]) == (64, 20)
    assert (value["dense"]["interface_tokens"], value["compressed"]["interface_tokens"]) == (66, 23)
    assert value["ratio"]["tokens"] == pytest.approx(20 / 64)
    assert value["dense"]["generation_seconds"] is None
    for task in ("understanding", "generation", "easy-vqa"):
        assert set(value["details"][task]) == {"dense", "compressed", "difference"}
    assert set(value["details"]["reconstruction"]["compressed"]) == {HOST, DECOMPRESSED, NEAREST}
    assert {label.split(":")[0] for label in told} == {"dense", "compressed"}


def test_a_dense_model_alone_fills_the_dense_side() -> None:
    dense = tiny_pair().dense
    assert dense is not None
    found = evaluate_model(dense, "understanding", amount=FEW)
    check_shape(found.as_json())
    assert found.dense.understanding_accuracy is not None
    assert found.compressed == Figures()
    assert found.ratio["tokens"] is None


def test_an_unknown_task_is_named() -> None:
    dense = tiny_pair().dense
    assert dense is not None
    with pytest.raises(InputError, match="unknown task 'undrstanding': use one of understanding"):
        evaluate_model(dense, "undrstanding")


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    made = Result(
        command="unicompress evaluate x",
        dense=Figures(psnr=20.0, generation_seconds=2.0, kv_cache_bytes=10),
        compressed=Figures(psnr=19.5, generation_seconds=0.5),
        compressed_breakdown=Breakdown(head=0.1),
        seeds=(0, 1),
        details={"note": "kept"},
    )
    made.write(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == made
    assert made.ratio["generation_seconds"] == 0.25
    assert made.ratio["kv_cache_bytes"] is None
    assert made.with_command("other").command == "other"


def test_json_holds_no_infinities_and_no_foreign_types() -> None:
    @dataclasses.dataclass
    class Inner:
        value: float

    made = plain(
        {
            "a": float("inf"),
            "b": np.float32(0.5),
            "c": torch.tensor([1, 2]),
            "d": Inner(1.5),
            5: (True,),
        }
    )
    assert made == {"a": None, "b": 0.5, "c": [1, 2], "d": {"value": 1.5}, "5": [True]}
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize("text", ["[]", '{"schema": 2}', '{"dense": {}}'])
def test_foreign_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json is not a unicompress result"):
        Result.load(tmp_path / "x.json")


def test_the_commit_falls_back_to_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_git", lambda folder, *arguments: None)
    assert results.commit() == "unknown" or results.commit().startswith("version ")
    calls: list[Sequence[str]] = []

    def git(folder: Path, *arguments: str) -> str:
        calls.append(arguments)
        return {"rev-parse": "abc", "status": " M x", "ls-files": "result.py"}[arguments[0]]

    monkeypatch.setattr(results, "_git", git)
    assert results.commit() == "abc-dirty"


def test_the_hardware_line_names_processor_and_torch() -> None:
    line = results.hardware()
    assert torch.__version__ in line
    assert "cores" in line
    assert "\n" not in line


# The shipped models


def test_a_missing_reference_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WEIGHTS", tmp_path)
    assert not reference.available()
    with pytest.raises(CheckpointError, match=r"'dense' is not in .*: reinstall") as caught:
        reference.load("dense")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="use one of dense, compressed"):
        reference.folder("sparse")


def test_the_reference_loads_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_pair().compressed
    assert model is not None
    model.save_pretrained(tmp_path / "compressed", dtype=torch.bfloat16)
    monkeypatch.setattr(reference, "WEIGHTS", tmp_path)
    loaded = reference.load("compressed")
    assert next(loaded.parameters()).dtype == torch.float32
    assert loaded.tokens_per_image == model.tokens_per_image
    assert not loaded.training
