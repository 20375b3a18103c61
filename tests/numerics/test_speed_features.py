"""What makes things fast changes no result: losses, gradients, tokens and frames with each feature on and off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from speechllm_prune.evaluation.efficiency import Meter
from speechllm_prune.inference import Hypothesis, decode, greedy_search
from speechllm_prune.models.decoder import decoder_layers, training_layers
from speechllm_prune.models.encoder import load_encoder
from speechllm_prune.models.estimate import step_memory, training_memory
from speechllm_prune.models.loss import loss_sums
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.distill import teacher_rows
from speechllm_prune.prune.surgery import PrunePlan, num_layers
from speechllm_prune.restore import cut, set_trainable, train_names
from speechllm_prune.stages.evaluate import _speed
from tests.numerics.common import batch_of, build
from tests.recipes.conftest import MakeLeaf, make_leaf  # noqa: F401
from tests.recipes.verbs import good, hypotheses, tensors


def gradients(model: SpeechLLM, *arguments: Any) -> tuple[float, int, dict[str, Tensor]]:
    """Loss, correct labels, and the gradient of everything trainable."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # of dropout
    sums = model(*arguments)
    sums.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(sums.loss.detach()), int(sums.num_correct), found


def trained_model(encoder: Path, decoder: Path, **keys: Any) -> SpeechLLM:
    """With a trainable projector and adapters with dropout, in train mode."""
    model = build(encoder, decoder, decoder_lora_rank=4, decoder_lora_dropout=0.3, **keys)
    set_trainable(model, train_names(model))
    return model.train()


def assert_equal(found: Any, expected: Any) -> None:
    """Same loss and gradients."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == expected[1]
    assert found[2].keys() == expected[2].keys() and len(expected[2]) > 4
    for name, gradient in expected[2].items():
        assert gradient.norm() > 0
        # Rounding of 1e-7 in a state grows on its way through the layers.
        assert (found[2][name] - gradient).norm() <= 2e-5 * gradient.norm(), name


class Kept:
    """Context: bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, model: SpeechLLM) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.hooks.__exit__(*exc_info)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def size(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("beta", [None, 0.7])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunked_loss(wavlm_layer: Path, qwen2_tied: Path, rows: int, beta: float | None) -> None:
    model = trained_model(wavlm_layer, qwen2_tied)
    batch = batch_of(model)
    arguments: list[Any] = [batch]
    if beta is not None:
        with torch.no_grad():
            said = teacher_rows(torch.randn_like(model.label_logits(batch)[0]), 5)
        arguments.append(said._replace(beta=beta))
    expected = gradients(model, *arguments)
    with Kept(model) as kept_whole:
        model(*arguments)
    model.loss_chunk_rows = rows
    seen: list[int] = []
    handle = model.decoder.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    assert_equal(gradients(model, *arguments), expected)
    handle.remove()
    num_labels = sum(len(ids) + 1 for ids in batch.target_ids)
    assert max(seen) == rows and sum(seen) == 2 * num_labels  # the second time going back
    with Kept(model) as kept_chunks:
        model(*arguments)
    logits = num_labels * model.decoder.config.vocab_size * 4
    assert logits in kept_whole.storages.values() and logits not in kept_chunks.storages.values()


def test_chunked_loss_at_its_rows(wavlm_layer: Path, qwen2: Path) -> None:
    decoder = build(wavlm_layer, qwen2).decoder
    labels, said = torch.randint(0, 200, (23,)), teacher_rows(torch.randn(23, 350), 5)
    found = []
    for chunk in (0, 1, 5, 22):
        rows = torch.randn(23, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sums = loss_sums(decoder, rows, labels, said, chunk)
        sums.loss.backward()
        assert rows.grad is not None and int(sums.num_labels) == 23
        found.append((sums.loss.detach(), sums.num_correct, rows.grad))
    for loss, correct, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        assert correct == found[0][1]
        torch.testing.assert_close(gradient, found[0][2], rtol=1e-6, atol=1e-6)


def test_more_rows_than_labels_is_one_piece(wavlm_layer: Path, qwen2: Path) -> None:
    model = trained_model(wavlm_layer, qwen2, loss_chunk_rows=1000)
    calls: list[int] = []
    model.decoder.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    gradients(model, batch_of(model))
    assert calls == [1]


@pytest.mark.parametrize(
    "how",
    [
        {"checkpointing": True, "compiled": False},
        pytest.param(
            {"checkpointing": False, "compiled": True, "backend": "aot_eager"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"checkpointing": True, "compiled": True, "backend": "aot_eager"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["checkpointing", "compiled", "both"],
)
def test_training_layers(wavlm_layer: Path, llama: Path, how: dict[str, Any]) -> None:
    model = trained_model(wavlm_layer, llama)
    if how["compiled"]:  # a compiled layer draws its dropout in another order
        for module in model.decoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    batches = [batch_of(model), batch_of(model, [3, 6, 1])]
    expected = [gradients(model, batch) for batch in batches]
    plain = [type(layer).forward for layer in decoder_layers(model.decoder)]
    with training_layers(model.decoder, **how):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(gradients(model, batch), wanted)
    assert [layer.forward.__func__ for layer in decoder_layers(model.decoder)] == plain


def test_checkpointing_keeps_the_inputs_of_layers(wavlm_layer: Path, llama: Path) -> None:
    model = trained_model(wavlm_layer, llama)
    batch = batch_of(model)
    with Kept(model) as everything:
        model(batch)
    with training_layers(model.decoder, True, False), Kept(model) as inputs:
        model(batch)
    assert inputs.size < everything.size / 3


def test_checkpointing_acts_on_gradients_only(wavlm_layer: Path, llama: Path) -> None:
    model = trained_model(wavlm_layer, llama)
    calls: list[int] = []
    handle = decoder_layers(model.decoder)[2].mlp.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )

    def count(action: Callable[[], Any]) -> int:
        calls.clear()
        action()
        return len(calls)

    batch = batch_of(model)
    with training_layers(model.decoder, checkpointing=True, compiled=False):
        assert count(lambda: gradients(model, batch)) == 2
        with torch.no_grad():
            assert count(lambda: model(batch)) == 1
        steps = count(lambda: decode(model, [batch]))
        # Healing the decoder alone: below the first trained tensor there is nothing to go back through.
        set_trainable(model, [name for name in train_names(model) if ".layers.5." in name])
        assert count(lambda: gradients(model, batch)) == 1
    assert count(lambda: decode(model, [batch])) == steps
    handle.remove()


@pytest.mark.slow
def test_few_graphs_for_many_layers_and_lengths(wavlm_layer: Path, llama: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = trained_model(wavlm_layer, llama)
    counter = CompileCounter()
    with training_layers(model.decoder, False, True, counter):
        for words in ([1, 5, 2], [4, 2], [3, 3, 3, 6], [2, 7]):
            gradients(model, batch_of(model, words))
        trained = counter.frame_count
        decode(model, [batch_of(model)])
    assert 0 < trained <= 3 and counter.frame_count == trained
    torch._dynamo.reset()


def test_estimate_of_what_a_step_keeps(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2)
    set_trainable(model, train_names(model))
    batch, config = batch_of(model.train()), model.decoder.config.to_dict()
    longest = max(map(model.num_positions, batch.audio_lengths, map(len, batch.target_ids)))
    positions = len(batch) * longest
    with Kept(model) as kept:
        model(batch)
    whole = step_memory(config, 0, 0, positions, 0, element_size=4)
    assert kept.size == pytest.approx(whole, rel=0.1)
    with training_layers(model.decoder, True, False), Kept(model) as kept:
        model(batch)
    least = step_memory(config, 0, 0, positions, 0, element_size=4, checkpointing=True)
    assert kept.size < least < whole / 3  # going back, one layer is kept whole
    first = training_memory(model, train_names(model), positions)
    model.loss_chunk_rows = 1
    assert training_memory(model, train_names(model), positions) < first
    assert training_memory(model, train_names(model), positions, checkpointing=True) < first - least


# ---------------------------------------------------------------------------------------------- decoding


def hypothesis(seconds: float, num_tokens: int, capped: bool = False) -> Hypothesis:
    return Hypothesis("", "", "", seconds, num_tokens, capped, False)


def test_the_first_of_several_batches_is_the_warm_up() -> None:
    with Meter("cpu") as several:
        assert list(several.warmed("abc")) == list("abc")
    assert 0 < several.warmup_seconds < several.seconds
    with Meter("cpu") as single:
        assert list(single.warmed("a")) == ["a"]
    assert single.warmup_seconds == 0
    several.seconds, several.warmup_seconds, several.peak_memory_bytes = 5.0, 1.0, 7
    single.seconds, single.peak_memory_bytes = 2.0, 9
    parts = [[hypothesis(9.0, 9)], [hypothesis(3.0, 4), hypothesis(2.0, 3, capped=True)]]
    found = _speed([(parts, several), ([[hypothesis(1.0, 1)]], single), ([], single)])
    assert found == {
        "rtfx": 6.0 / 4.0,
        "tokens_per_second": (5 + 3 + 2) / 4.0,  # an end is a token, a cap is none
        "timed_utterances": 3,
        "timed_audio_seconds": 6.0,
        "timed_seconds": 4.0,
        "seconds": 5.0,
        "peak_memory_bytes": 9,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_fixed_cache_gives_the_same_tokens(
    wavlm_layer: Path, decoder_folder: Path, attention: str
) -> None:
    found = []
    for graphs in ("never", "auto", "always"):
        model = build(wavlm_layer, decoder_folder, attention=attention, decode_graphs=graphs)
        assert model.decode_graphs == graphs
        found.append([h.hyp for h in decode(model, [batch_of(model)])])
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 2


@torch.no_grad()
def test_fixed_cache_is_what_always_takes(
    wavlm_layer: Path, qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(wavlm_layer, qwen2)
    inputs = model.inputs_for(batch_of(model), targets=False, padding_side="left")
    taken: list[str] = []
    for name in ("_search_fixed", "_search_growing"):
        monkeypatch.setattr(
            f"speechllm_prune.search.{name}",
            lambda *arguments, name=name: taken.append(name) or [[]] * 4,
        )
    for graphs in ("always", "auto", "never"):
        greedy_search(
            model.decoder, inputs.inputs_embeds, inputs.attention_mask, [4] * 4, frozenset(), graphs
        )
    assert taken == ["_search_fixed", "_search_growing", "_search_growing"]  # auto: no GPU here


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_on_a_gpu_give_the_same_tokens(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2, device="cuda")
    batch = batch_of(model).to("cuda")
    expected = [h.hyp for h in decode(model, [batch])]
    model.decode_graphs = "always"
    assert [h.hyp for h in decode(model, [batch])] == expected


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2, device="cuda")
    set_trainable(model, train_names(model))
    batch = batch_of(model).to("cuda")
    model(batch).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("kind", ["wavlm_layer", "wavlm_group"])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_wavlm_attention(kind: str, padded: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    theirs = AutoModel.from_pretrained(folder).eval()
    ours = load_encoder(str(folder)).model
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    lengths = torch.tensor([60, 31, 7, 59] if padded else [60] * 4)
    mask = torch.arange(60) < lengths[:, None] if padded else None
    hidden = 3 * torch.randn(4, 60, theirs.config.hidden_size)
    found, expected = (
        model.encoder(hidden.clone(), attention_mask=mask).last_hidden_state
        for model in (ours, theirs)
    )
    real = torch.arange(60) < lengths[:, None]
    assert expected[real].std() > 0.1
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


@torch.no_grad()
def test_wavlm_attention_never_asks_for_weights(
    wavlm_layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("transformers' own attention was called")

    encoder = load_encoder(str(wavlm_layer))
    copied = copy.deepcopy(encoder)
    monkeypatch.setattr("torch.nn.functional.multi_head_attention_forward", refuse)
    wavs = torch.randn(1, 9000)
    assert torch.equal(encoder(wavs, [9000])[0], copied(wavs, [9000])[0])


# ---------------------------------------------------------------------------------------------- verbs


@pytest.mark.slow
def test_keys_change_no_result_of_the_verbs(make_leaf: MakeLeaf) -> None:  # noqa: F811
    fast = {
        "loss_chunk_rows": 3,
        "gradient_checkpointing": True,
        "decode_graphs": "always",
        "eval_batch_positions": 60,
    }
    studies = [make_leaf(experiment_name="plain"), make_leaf(experiment_name="fast", **fast)]
    printed = [good("train", study.leaf).out for study in studies]
    states = [tensors(study.root / "train") for study in studies]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-4)
    assert len({tuple(hypotheses(study.root, "full").items()) for study in studies}) == 1
    assert all("memory:   about 0.0 GiB" in out for out in printed)
    # They say how fast, not what: such a key may change from one command to the next.
    study = studies[0]
    measured = good("measure", study.leaf, "--gradient_checkpointing", "True").out
    assert "another" not in measured and (study.root / "measure/speech/DONE.json").is_file()


@pytest.mark.gpu
def test_removed_layers_leave_the_gpu_and_come_back(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2, device="cuda")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allocated = torch.cuda.memory_allocated()
    with cut(model, PrunePlan(num_layers(model.decoder), 1, 2)):
        assert torch.cuda.memory_allocated() < allocated
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
