"""Distillation: the divergence against the textbook sum, the teacher's rows against the model that gave them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speechllm_prune.prune.distill import TeacherStore, ask_teacher, divergence, teacher_rows
from tests.numerics.common import batch_of, build


def textbook(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """sum p log(p / q) over rows and tokens, in float64."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return float((p * (p / q).log()).sum())


def test_whole_vocabulary_is_the_textbook_divergence() -> None:
    teacher, student = 3 * torch.randn(6, 20), 3 * torch.randn(6, 20)
    ours = divergence(teacher_rows(teacher, 20), student)
    assert ours.item() == pytest.approx(textbook(teacher, student), rel=1e-5)


def test_the_rest_is_one_class() -> None:
    teacher, student = 3 * torch.randn(5, 30), 3 * torch.randn(5, 30)
    rows = teacher_rows(teacher, 4)
    expected = 0.0
    for row, ids in enumerate(rows.token_ids.tolist()):
        p, q = (logits[row].double().softmax(-1) for logits in (teacher, student))
        others = [i for i in range(30) if i not in ids]
        p = torch.stack([*p[ids], p[others].sum()])
        q = torch.stack([*q[ids], q[others].sum()])
        expected += float((p * (p / q).log()).sum())
    ours = divergence(rows, student).item()
    assert ours == pytest.approx(expected, rel=1e-4)
    assert ours < textbook(teacher, student)


def test_a_certain_teacher_gives_finite_gradients() -> None:
    teacher = torch.zeros(2, 10)
    teacher[:, 3] = 200.0
    student = torch.zeros(2, 10, requires_grad=True)
    divergence(teacher_rows(teacher, 3), student).backward()
    assert torch.isfinite(student.grad).all() and student.grad[:, 3].max() < 0
    certain = teacher.clone().requires_grad_()
    loss = divergence(teacher_rows(teacher, 3), certain)
    loss.backward()
    assert loss.item() < 1e-3 and torch.isfinite(certain.grad).all()


def test_rows_come_back_in_the_order_of_any_batch(
    wavlm_layer: Path, qwen2: Path, tmp_path: Path
) -> None:
    """Asked in one batch, stored, read in another order: the divergence of the teacher from itself is zero."""
    model = build(wavlm_layer, qwen2)
    batch = batch_of(model, (1, 5, 2, 4))
    ask_teacher(model, [batch], top=8).save(tmp_path / "teacher.safetensors")
    store = TeacherStore.load(tmp_path / "teacher.safetensors")
    assert batch.ids[0] in store and "nobody" not in store
    order = [2, 0, 3]
    again = type(batch)(
        [batch.ids[i] for i in order],
        batch.audio[order],
        [batch.audio_lengths[i] for i in order],
        [batch.target_ids[i] for i in order],
        [batch.texts[i] for i in order],
        [batch.durations[i] for i in order],
    )
    rows = store.rows_of(again.ids, beta=1.0)
    with torch.no_grad():
        plain, taught = model(again), model(again, rows)
        shuffled = model(again, store.rows_of(sorted(again.ids, reverse=True), beta=1.0))
    torch.testing.assert_close(plain.loss, taught.loss, atol=1e-4, rtol=0)
    assert shuffled.loss > plain.loss + 0.1, "rows of other utterances are another teacher"
    assert taught.num_labels == plain.num_labels


def test_beta_weighs_the_divergence(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2)
    batch = batch_of(model)
    with torch.no_grad():
        logits, _ = model.label_logits(batch)
        rows = teacher_rows(logits + torch.randn_like(logits), top=8)
        plain = model(batch).loss
        for beta in (0.5, 2.0):
            expected = plain + beta * divergence(rows, logits)
            torch.testing.assert_close(model(batch, rows._replace(beta=beta)).loss, expected)
