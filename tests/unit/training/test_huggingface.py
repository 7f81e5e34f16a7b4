"""Tasks from configurations of Hugging Face: counted, trained, and taken back to its Trainer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from nas.designs.design import parse_design
from nas.errors import InvalidInput
from nas.layers import StructuredLinear, forward_flops, load, param_groups
from nas.planning import cost
from nas.planning.runs import plan_of_steps
from nas.planning.tasks import recipe_of
from nas.training.huggingface import HuggingFaceTask, scaled
from nas.training.plugin import use_task
from nas.training.run import train
from nas.training.tasks import build_model
from tests.support.hugging import TASKS, TinyGPT2, TinyLlama, TinyT5, TinyViT
from tests.support.tiers import only

KINDS = {kind.name: kind for kind in TASKS}


def task_of(kind: type[HuggingFaceTask]) -> HuggingFaceTask:
    task = kind()
    use_task(task)
    return task


@pytest.mark.parametrize("name", only(["tiny-llama"], KINDS))
def test_a_dense_model_counts_as_that_of_transformers(name: str) -> None:
    task = task_of(KINDS[name])
    recipe = recipe_of(name)
    for width in (recipe.widths[0], 64, recipe.widths[-1]):
        model = task._dense(width).eval()
        own = forward_flops(model, **_call(task, width))
        assert cost.forward_flops_per_sample(recipe, parse_design("dense"), width) == own
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert cost.parameters(recipe, parse_design("dense"), width) == parameters


def _call(task: HuggingFaceTask, width: int) -> dict[str, Any]:
    """One sample, as transformers' own model takes it."""
    x = task.example(recipe_of(task.name), 1)
    if isinstance(task, TinyViT):
        return {"pixel_values": x}
    if isinstance(task, TinyT5):
        return {"input_ids": x[:, :16], "decoder_input_ids": x[:, 16:], "use_cache": False}
    return {"input_ids": x}


@pytest.mark.parametrize("name", only(["tiny-llama"], KINDS))
def test_what_grows_is_structured_and_the_rest_stays(name: str) -> None:
    task = task_of(KINDS[name])
    model = build_model(recipe_of(name), parse_design("monarch"), 64)
    layers = [n for n, m in model.named_modules() if isinstance(m, StructuredLinear)]
    assert len(layers) >= 8
    for ending in ("lm_head", "classifier", "shared", "router", "decoder.weight"):
        assert not any(n.endswith(ending) for n in layers)
    assert forward_flops(model.eval(), task.example(recipe_of(name), 2)) == (
        2 * cost.forward_flops_per_sample(recipe_of(name), parse_design("monarch"), 64)
    )


def test_heads_and_groups_of_queries_keep_their_size() -> None:
    task = task_of(TinyLlama)
    recipe = recipe_of("tiny-llama")
    assert list(recipe.widths) == [32, 64, 96]  # whole key-value heads alone
    for width, heads, groups in ((32, 2, 1), (96, 6, 3)):
        config = scaled(task.config, width)
        assert (config.num_attention_heads, config.num_key_value_heads) == (heads, groups)
        roles = [layer.role for layer in cost.sheet_of(recipe, width).layers][:4]
        assert [(r.d_out, r.heads, r.side) for r in roles] == [
            (width, heads, "out"), (width // 2, groups, "out"), (width // 2, groups, "out"),
            (width, heads, "in"),
        ]  # fmt: skip
    aligned = build_model(recipe, parse_design("monarch@heads"), 64)
    keys: Any = aligned.get_submodule("model.model.layers.0.self_attn.k_proj")
    assert keys.structure.sizes.phi == 2
    with pytest.raises(InvalidInput, match="num_key_value_heads, 2 at width 64"):
        scaled(task.config, 48)


@pytest.mark.parametrize("name", only(["tiny-llama", "tiny-vit"], KINDS))
def test_it_learns(name: str, text_folder: Path) -> None:
    task = task_of(KINDS[name])
    recipe = recipe_of(name, None, {"evaluations": 6, "validation_samples": 32})
    data = None if name == "tiny-vit" else str(text_folder)
    learnt, held = task.load(recipe, data)
    plan = plan_of_steps(recipe, parse_design("btt:rho=1/4"), 32, 90)
    points = list(train(plan, recipe, learnt, held, 1))
    ignorant = math.log(10 if name == "tiny-vit" else 96)
    assert points[-1].loss < 0.8 * ignorant
    assert points[-1].loss < points[0].loss


def test_the_best_goes_on_with_their_trainer_and_is_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = TinyLlama().build("btt:rho=1/4", 64)
    assert isinstance(model, transformers.LlamaForCausalLM)
    rows = torch.randint(96, (32, 16), generator=torch.Generator().manual_seed(0)) // 24
    samples = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=20, per_device_train_batch_size=8, report_to=[],
        save_strategy="no", use_cpu=True, logging_steps=5, disable_tqdm=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3, base_width=64))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples, optimizers=(optimizer, None)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "kept")
    again = load(transformers.LlamaForCausalLM(scaled(TinyLlama.config, 64)), tmp_path / "kept")
    x = rows[:2]
    torch.testing.assert_close(again.eval()(x).logits, model(x).logits)


def test_a_configuration_that_has_no_size_for_the_data_is_refused() -> None:
    class Few(TinyViT):
        config = transformers.ViTConfig(**{**TinyViT.config.to_dict(), "num_labels": 3})

    recipe = replace(recipe_of_few(), depth=2)
    with pytest.raises(InvalidInput, match="10 classes; accepted: at most 3"):
        Few().load(recipe, None)


def recipe_of_few() -> Any:
    task_of(TinyViT)
    return recipe_of("tiny-vit")


def test_windows_hold_what_the_text_does(text_folder: Path) -> None:
    task = task_of(TinyGPT2)
    recipe = recipe_of("tiny-gpt2")
    learnt, _ = task.load(recipe, str(text_folder))
    split = {"tokens": torch.from_numpy(learnt["tokens"])}
    x, y = task.batch(recipe, split, torch.tensor([0, 5]), None)
    assert x.shape == y.shape == (2, 32)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x[1], split["tokens"][5:37].long())
