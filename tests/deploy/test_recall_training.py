"""What trains the models that come with Baton: the parts that can be tried in a moment."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

MODELS = Path(__file__).parents[2] / "deploy" / "models"


Part = Callable[[str], ModuleType]


@pytest.fixture
def part(monkeypatch) -> Part:
    """A module of the training; most import transformers' models, which takes seconds."""
    monkeypatch.syspath_prepend(str(MODELS))
    return lambda name: importlib.import_module(f"recall_training.{name}")


@pytest.mark.slow
def test_a_converted_model_is_near_what_it_came_from(part: Part) -> None:
    """Each layer's attention says most of what the other's says, and the experts of one say what its MLP says."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    source, tokenizer = part("checkpoint").load(MODELS / "recall", cpu)
    fresh, converted = (part("architectures").build_model("mla", tokenizer) for _ in range(2))
    maker = part("batches").BatchMaker(tokenizer, cpu, 1)
    part("conversion").convert(source, converted, maker)
    tap, batch = part("imitation").AttentionTap(source), maker.separate(2, 24, 4)
    taught = tap.run(batch)
    with torch.no_grad():
        near, far = (part("imitation").layer_errors(model, taught, batch) for model in (converted, fresh))
        given = torch.nn.functional.normalize(torch.randn(1, 200, 192), dim=-1) * 14
        for old, new in zip(source.model.layers, converted.model.layers, strict=True):
            said = old.mlp(given)
            assert (new.mlp(given) - said).square().mean() < 0.5 * said.square().mean()
    assert (far > 0.9).all()
    assert (near < 0.6).all()


def test_the_rate_falls_in_time(part: Part) -> None:
    """Steps of a second each: of ten minutes the last 100 steps are kept for the cool-down; of 500 steps, too."""
    for steps, minutes, last in ((100_000, 10.0, 600), (500, 60.0, 500)):
        schedule, step = part("schedule").Schedule(10, 100, steps, minutes), 0
        while step < schedule.end:
            assert 0 < schedule.share(step) <= 1
            step += 1
            schedule.observe(step, float(step))
        assert 0.95 * last <= step <= last
        assert schedule.share(step - 1) == pytest.approx(0.01)


@pytest.mark.slow
def test_only_latent_attention_is_converted_to(part: Part, capsys) -> None:
    with pytest.raises(SystemExit):
        part("command_line").parse(["--out", "x", "--convert", "y"])
    assert "--convert makes an mla model, not one of --architecture llama" in capsys.readouterr().err
