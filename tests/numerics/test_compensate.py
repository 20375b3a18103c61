"""Compensation of a cut against least squares by NumPy on states taken from Hugging Face, one sequence at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.compensate import fit_compensation, solve
from speechllm_prune.prune.surgery import remove_layers
from speechllm_prune.runtime import UserError

START, SIZE, RIDGE = 2, 1, 0.05


def load(folder: Path) -> Any:
    """A tiny decoder whose layers do something: the initial weights are too small to need compensation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for weight in (layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def sequences(width: int, lengths: tuple[int, ...] = (9, 14, 5, 30, 22, 40)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, width, generator=generator) for n in lengths]


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """One batch whose padding is loud, so that it would be noticed in a sum."""
    longest = max(map(len, rows))
    embeds = torch.full((len(rows), longest, rows[0].shape[1]), 50.0)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        embeds[i, where], mask[i, where] = row, 1
    return {"inputs_embeds": embeds, "attention_mask": mask}


def naive(model: Any, rows: list[torch.Tensor]) -> np.ndarray:
    """New weight from the stacked least-squares problem [X; sqrt(ridge) I] T^T = [Y; sqrt(ridge) I], by `lstsq`.

    Each position's equation is divided by the norm of the state that it should reach.
    """
    inputs, outputs = [], []
    mlp: list[torch.Tensor] = []
    layer = model.get_decoder().layers[START - 1]
    handle = layer.mlp.register_forward_hook(lambda m, a, out: mlp.append(out[0]))
    for row in rows:
        mlp.clear()
        with torch.no_grad():
            states = model(inputs_embeds=row[None], output_hidden_states=True).hidden_states
        # hidden_states[l] is the input of layer l (only the very last entry has passed the final norm).
        before, after, m = states[START][0], states[START + SIZE][0], mlp[0]
        for x, rest, target in zip(m.double(), (before - m).double(), after.double(), strict=True):
            inputs.append((x / target.norm()).numpy())
            outputs.append(((target - rest) / target.norm()).numpy())
    handle.remove()
    x, y = np.stack(inputs), np.stack(outputs)
    weight = np.sqrt(RIDGE * (x**2).sum(0).mean())
    identity = weight * np.eye(x.shape[1])
    transform = np.linalg.lstsq(np.vstack([x, identity]), np.vstack([y, identity]), rcond=None)[0].T
    return transform @ layer.mlp.down_proj.weight.detach().double().numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_weight_equals_naive_least_squares(decoder_folder: Path, side: str) -> None:
    model = load(decoder_folder)
    rows = sequences(model.config.hidden_size)
    batches = [padded(rows[:2], side), padded(rows[2:], side)]
    ours = fit_compensation(model, START, SIZE, batches, RIDGE)
    expected = naive(model, rows)
    np.testing.assert_allclose(ours.double().numpy(), expected, atol=2e-5)
    assert (
        np.abs(
            expected - model.get_decoder().layers[START - 1].mlp.down_proj.weight.detach().numpy()
        ).max()
        > 0.01
    )


def test_padding_would_be_noticed(decoder_folder: Path) -> None:
    """The wrong implementation, which sums over padding too, is far off."""
    model = load(decoder_folder)
    rows = sequences(model.config.hidden_size)
    batch = padded(rows, "right")
    right = fit_compensation(model, START, SIZE, [batch], RIDGE)
    wrong = fit_compensation(
        model,
        START,
        SIZE,
        [batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}],
        RIDGE,
    )
    assert (right - wrong).abs().max() > 1e-3


def test_the_cut_model_comes_nearer_to_the_whole_one(decoder_folder: Path) -> None:
    whole = load(decoder_folder)
    rows = sequences(whole.config.hidden_size, (60,) * 12)
    weight = fit_compensation(whole, START, SIZE, [padded(rows[:10], "right")], RIDGE)

    def error(model: Any) -> float:
        with torch.no_grad():
            states = [
                m.get_decoder()(inputs_embeds=torch.stack(rows[10:])).last_hidden_state
                for m in (whole, model)
            ]
        return float((states[0] - states[1]).norm() / states[0].norm())

    plain, mended = copy.deepcopy(whole), copy.deepcopy(whole)
    for model in (plain, mended):
        remove_layers(model, START, SIZE)
    mended.get_decoder().layers[START - 1].mlp.down_proj.weight.data = weight
    assert error(mended) < 0.99 * error(plain)  # fitted on other sequences than these


def test_a_strong_ridge_leaves_the_weight_alone(decoder_folder: Path) -> None:
    model = load(decoder_folder)
    batch = padded(sequences(model.config.hidden_size), "right")
    weight = model.get_decoder().layers[START - 1].mlp.down_proj.weight
    torch.testing.assert_close(
        fit_compensation(model, START, SIZE, [batch], 1e9), weight.data, atol=1e-5, rtol=0
    )


def test_block_to_the_end_is_fitted_before_the_final_norm(decoder_folder: Path) -> None:
    model = load(decoder_folder)
    depth = len(model.get_decoder().layers)
    batch = padded(sequences(model.config.hidden_size), "right")
    before = fit_compensation(model, depth - 1, 1, [batch], RIDGE)
    model.get_decoder().norm.weight.data.mul_(7.0)
    assert torch.equal(fit_compensation(model, depth - 1, 1, [batch], RIDGE), before)


def test_what_cannot_be_compensated_is_refused(decoder_folder: Path) -> None:
    model = load(decoder_folder)
    with pytest.raises(UserError, match="layer 0"):
        fit_compensation(model, 0, 1, [], RIDGE)
    with pytest.raises(UserError, match="nothing to fit"):
        fit_compensation(model, 1, 1, [], RIDGE)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(solve(identity, 2 * identity, 1.0), 1.5 * identity)
