"""The synergy experiment at the smallest size, its gradients and its arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stage_two_toy import saved_parts
from training_toy import interrupt_at
from unicompress.errors import InputError, RecipeError, UnicompressError
from unicompress.evals.result import Result
from unicompress.evals.results_page import load as load_results
from unicompress.evals.results_page import results_page
from unicompress.limits.gradients import compare_tasks, group_of
from unicompress.training import synergy
from unicompress.training.recipe import StageTwoRecipe, load_recipe, parse_recipe
from unicompress.training.stage_two import StageTwo
from unicompress.training.synergy import SynergyRecipe, run_synergy
from unicompress.training.synergy_report import gains, tables
from unicompress.unified import UnifiedModel

SHIPPED = Path(__file__).parents[1] / "recipes" / "reference" / "synergy.yaml"


class Shared(nn.Module):
    """One weight for both tasks, one for each alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 1, bias=False)])
        self.projector = nn.Parameter(torch.ones(3))
        self.heads = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(9), requires_grad=False)

    def loss(self, direction: tuple[float, float], own: str, scale: float = 1.0) -> Any:
        weight = self.layers[0].weight[0]
        return lambda: (
            scale * (weight * torch.tensor(direction)).sum() + getattr(self, own).sum() * scale
        )


def test_gradients_of_two_tasks_are_compared_by_group() -> None:
    toy = Shared()
    first = ([toy.loss((1, 0), "projector")], [toy.loss((1, 1), "projector")])
    second = ([toy.loss((0, 1), "heads", 5.0)], [toy.loss((0, -3), "heads")])
    found = compare_tasks(toy, first, second)
    assert set(found) == {"all", "layer 0", "projector", "other"}
    layer = found["layer 0"]
    # (2, 1) against (0, 5 - 3)
    assert layer.cosine == pytest.approx(1 / 5**0.5)
    assert layer.within == (pytest.approx(0.5**0.5), pytest.approx(-1.0))
    assert layer.reached == (1.0, 0.5, 0.5)
    assert (found["projector"].cosine, found["other"].cosine) == (None, None)
    assert found["projector"].reached == (1.0, 0.0, 0.0)
    assert found["all"].weights == 6  # what is frozen is no part of it
    assert found["all"].reached == (5 / 6, 2 / 6, 1 / 6)
    assert all(p.grad is None for p in toy.parameters())
    with pytest.raises(InputError, match="two halves of at least one loss"):
        compare_tasks(toy, first, (first[0], []))


def test_losses_of_a_half_are_averaged() -> None:
    toy = Shared()
    many = ([toy.loss((1, 0), "heads"), toy.loss((0, 1), "heads")], [toy.loss((1, 1), "heads")])
    found = compare_tasks(toy, many, many)
    assert found["layer 0"].within[0] == pytest.approx(1.0)
    assert found["layer 0"].cosine == pytest.approx(1.0)


def test_weights_are_grouped_by_what_they_are() -> None:
    assert group_of("lm.model.layers.11.self_attn.q_proj.weight") == "layer 11"
    assert group_of("lm.base_model.model.model.layers.2.mlp.up_proj.weight") == "layer 2"
    assert group_of("image_projections.read.3.k_proj.weight") == "image projections"
    assert group_of("lm.model.embed_tokens.weight") == "vocabulary"
    assert group_of("projector.layers.0.weight") == "projector"
    assert group_of("lm.model.norm.weight") == "other"


def result(accuracy: float | None, loss: float | None, seed: int) -> Result:
    known: dict[str, Any] = {
        "accelerators": [],
        "tokens_per_image": 4,
        "steps": 1,
        "batch": 1,
    }
    if accuracy is not None:
        known["understanding"] = {"accuracy": accuracy, "loss": 1 - accuracy}
    if loss is not None:
        known["generation"] = {"loss": loss, "whole": 0.5}
    return Result(command="", seeds=(seed,), details={"synergy": known})


def test_synergy_is_paired_by_seed_and_positive_for_a_gain() -> None:
    runs = {
        "both": {0: result(0.8, 2.0, 0), 1: result(0.7, 2.5, 1)},
        "u": {0: result(0.5, None, 0), 1: result(0.6, None, 1)},
        "g": {0: result(None, 2.5, 0), 1: result(None, 2.25, 1)},
        "bad": {0: result(0.4, 3.0, 0), 1: result(0.5, 3.0, 1)},
    }
    own = {"joint": "both", "understanding": "u", "generation": "g"}
    worse = {**own, "joint": "bad"}
    assert gains(runs, own, "questions, accuracy") == pytest.approx({0: 0.3, 1: 0.1})
    assert gains(runs, own, "answers, loss") == pytest.approx({0: 0.3, 1: 0.1})
    assert gains(runs, own, "codes, loss") == pytest.approx({0: 0.5, 1: -0.25})
    made = {t["title"]: t for t in tables(runs, {"own": own, "worse": worse}, "own")}
    assert made["Synergy"]["rows"][0][1] == "+0.200 +- 0.141"
    # The worse one gains -0.1 with either seed, the base 0.3 and 0.1.
    (row,) = made["Synergy loss"]["rows"]
    assert row[:3] == ["worse", "+0.300 +- 0.141", "+0.300 +- 0.141"]
    assert made["Runs"]["rows"][1][0] == "u"


LM = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    saved_parts(folder)
    return folder


def values(parts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    own = {"understanding_share": 1.0}, {"understanding_share": 0.0}
    accelerators = ["himix(projections='read')", "hmgen(count=1, projections='drawn')"]
    runs = {
        "U": own[0],
        "G": own[1],
        "both": {"times": 2},
        "accelerated": {"times": 2, "accelerators": accelerators},
        "short": {"codec": str(parts / "codec")},
    }
    comparison = {"understanding": "U", "generation": "G"}
    stage_two = {
        "out": str(out / "runs"),
        "tokenizer": str(parts / "host"),
        "lm": {"config": LM, "vocab_size": 300},
        "projector": "linear",
        "questions_per_image": 2,
        "steps": 2,
        "batch": 4,
        "lr": 1e-2,
        "log_every": 1,
        "validate_images": 4,
        "tensorboard": False,
        "cpu": True,
    }
    return {
        "stage_two": stage_two,
        "runs": runs,
        "comparisons": {
            "plain": {"joint": "both", **comparison},
            "faster": {"joint": "accelerated", **comparison},
        },
        "baseline": "plain",
        "seeds": [1],
        "questions": 6,
        "drawings": 2,
        "gradient_images": 4,
        "results": str(out / "results"),
        **changes,
    }


def test_the_experiment_runs_run_by_run_and_makes_its_page(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unicompress.training.language.TEXT_SAMPLES", 20)
    path = tmp_path / "synergy.yaml"
    path.write_text(yaml.safe_dump(values(parts, tmp_path), sort_keys=False))
    build, built = synergy.build_model, []

    def counted(stage: StageTwoRecipe) -> UnifiedModel:
        built.append(stage.out)
        return build(stage)

    monkeypatch.setattr(synergy, "build_model", counted)
    with monkeypatch.context() as only:
        stop = interrupt_at(2)  # which the short runs do not reach
        only.setattr(StageTwo, "after_step", lambda _self, step: stop(step))
        assert synergy.main([str(path)]) == 2
    assert "both, seed 1, was interrupted at step 3 of 4" in capsys.readouterr().err
    folder = tmp_path / "results" / "synergy"
    first = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert set(first) == {"u-seed1.json", "g-seed1.json"}
    assert synergy.main([str(path)]) == 0
    log = (tmp_path / "runs" / "both-seed1" / "log.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, log) if "loss" in line]
    assert steps == [1, 2, 3, 4]  # none twice
    # A run on one task has no gradients to compare, and needs no model but the trained one.
    assert {Path(out).name for out in built} == {
        f"{n}-seed1" for n in ("both", "accelerated", "short")
    }
    assert len(list(folder.iterdir())) == 5
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in first.items())
    runs = {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}
    reader, drawer = (runs[f"{name}-seed1"]["details"]["synergy"] for name in ("u", "g"))
    assert ("understanding" in reader, "generation" in reader) == (True, False)
    assert ("understanding" in drawer, "generation" in drawer) == (False, True)
    assert "gradients" not in reader
    for name in ("both", "accelerated"):
        found = runs[f"{name}-seed1"]["details"]["synergy"]["gradients"]
        assert {"all", "layer 0", "layer 2", "vocabulary"} <= found["start"].keys()
        assert -1 <= found["end"]["layer 1"]["cosine"] <= 1
    # A task's own projections are reached by that task alone.
    assert found["end"]["image projections"]["reached_by_both"] == 0
    costs = [runs[f"{n}-seed1"]["details"]["synergy"]["gigaflops"] for n in ("both", "accelerated")]
    assert costs[1]["understanding"] < 0.9 * costs[0]["understanding"]
    assert costs[1]["generation"] < 0.9 * costs[0]["generation"]
    assert runs["both-seed1"]["dense"]["tokens_per_image"] == 64
    assert runs["short-seed1"]["compressed"]["tokens_per_image"] == 18
    page = results_page(load_results([tmp_path / "results" / "synergy.json"]))
    assert "### Synergy loss" in page
    assert "| plain |" in page


def test_complete_seeds_are_reported_before_all_are(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(SynergyRecipe, values(parts, tmp_path, seeds=[3, 1, 2]), "r.yaml")

    def measured(stage: StageTwoRecipe, _: SynergyRecipe, name: str, command: str) -> Result:
        if (name, stage.seed) == ("both", 2):
            raise UnicompressError("interrupted")
        return result(0.5 + stage.seed / 10 * (name == "both"), 1.0, stage.seed)

    monkeypatch.setattr(synergy, "_run", measured)
    with pytest.raises(UnicompressError, match="interrupted"):
        run_synergy(recipe, "r.yaml", "")
    report = Result.load(tmp_path / "results" / "synergy.json")
    assert report.seeds == (3, 1)
    assert "Seeds: 2, 3 are planned." in report.details["note"]
    known = {table["title"]: table for table in report.details["tables"]}
    assert known["Synergy"]["rows"][0][1] == "+0.200 +- 0.141"  # of 0.3 and 0.1
    assert known["Runs"]["rows"][0][-1] == "2"
    monkeypatch.setattr(synergy, "_run", lambda s, _r, _n, _c: result(0.5, 1.0, s.seed))
    run_synergy(recipe, "r.yaml", "")
    report = Result.load(tmp_path / "results" / "synergy.json")
    assert report.seeds == (3, 1, 2)
    assert "Seeds: 3. Measured" in report.details["note"]


def test_attention_counts_as_arithmetic_on_a_cpu(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicompress.training.language.TEXT_SAMPLES", 20)
    recipe = parse_recipe(SynergyRecipe, values(parts, tmp_path), "r.yaml")
    stage = synergy._stage(recipe, "both", {}, 1, "r.yaml")
    model = synergy.build_model(stage).eval()
    found = synergy.forward_gigaflops(model, stage)
    monkeypatch.setattr(synergy, "flop_counter", lambda: FlopCounterMode(display=False))
    products = synergy.forward_gigaflops(model, stage)  # torch counts no fused attention of a CPU
    layer = 4 * 16 * 16 + 3 * 16 * 24
    for task in ("understanding", "generation"):
        positions = products[task] * 1e9 / (2 * 3 * layer)
        assert positions > 64 + 2
        attention = 4 * 3 * 16 * positions**2
        assert (found[task] - products[task]) * 1e9 == pytest.approx(attention)


def test_every_run_of_a_seed_sees_the_same_images(parts: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(SynergyRecipe, values(parts, tmp_path), "r.yaml")
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("U", "both"):
        stage = synergy._stage(recipe, name, recipe.runs[name], 1, "r.yaml")
        batches = synergy.UnifiedBatches(stage, 32, synergy.Place())
        seen[name] = [b for step in range(stage.steps) for b in batches.at(step)[0].read]
    assert len(seen["U"]) == len(seen["both"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen["U"], seen["both"], strict=True))


def test_mistakes_in_a_recipe_are_named(parts: Path, tmp_path: Path) -> None:
    wrong = {"x": {"joint": "both", "understanding": "U", "generation": "nobody"}}
    for changes, said in (
        ({"comparisons": wrong, "baseline": "x"}, "'x' names an unknown run 'nobody'"),
        ({"baseline": "z"}, "baseline 'z' is none of the comparisons"),
        ({"seeds": [1, 1]}, "each once"),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_recipe(SynergyRecipe, values(parts, tmp_path, **changes), "r.yaml")
    recipe = parse_recipe(
        SynergyRecipe,
        values(parts, tmp_path, runs={"U": {}, "G": {}, "both": {"step": 3}, "accelerated": {}}),
        "r.yaml",
    )
    with pytest.raises(RecipeError, match=r"run both: unknown key step\. Did you mean steps"):
        run_synergy(recipe, "r.yaml", "")


def test_the_shipped_experiment_is_that_of_the_paper_and_more() -> None:
    recipe = load_recipe(SynergyRecipe, SHIPPED)
    assert len(recipe.seeds) >= 3
    stages = {
        name: synergy._stage(recipe, name, changes, 0, str(SHIPPED))
        for name, changes in recipe.runs.items()
    }
    for comparison in recipe.comparisons.values():
        joint, reader, drawer = (stages[name] for name in comparison.model_dump().values())
        assert (reader.understanding_share, drawer.understanding_share) == (1, 0)
        assert joint.understanding_share == 0.5
        assert joint.codec == reader.codec == drawer.codec
        expected = 1 if "equal total" in joint.out or "equal-total" in joint.out else 2
        assert joint.steps == expected * reader.steps == expected * drawer.steps
    alone = {name for name, stage in stages.items() if stage.accelerators}
    assert len(alone) == 6
    assert len({stage.out for stage in stages.values()}) == len(stages)
