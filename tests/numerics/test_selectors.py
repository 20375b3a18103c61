"""Losses of candidate blocks: shared forward passes against removing each block and running everything again."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from speechllm_prune.models.decoder import decoder_layers
from speechllm_prune.models.speechllm import DecoderInputs
from speechllm_prune.prune.distance import measure_distances
from speechllm_prune.prune.selectors import Block, best_blocks, block_losses
from speechllm_prune.prune.surgery import PrunePlan, remove_layers
from speechllm_prune.restore import cut
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.numerics.common import batch_of, build, digest, random_inputs, tensors_of
from tests.numerics.test_surgery import FAMILIES
from tests.numerics.two_ranks_losses import losses

L = tiny.DECODER_LAYERS
BLOCKS = [(start, n) for n in range(1, L) for start in range(L - n)]


def count_layers(decoder: Any) -> list[int]:
    """A list that grows by one whenever a layer runs."""
    calls: list[int] = []
    for index, layer in enumerate(decoder_layers(decoder)):
        layer.register_forward_hook(lambda m, a, output, index=index: calls.append(index))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_losses_equal_cut_and_forward_bit_for_bit(
    wavlm_layer: Path, decoder_folder: Path, lora_rank: int
) -> None:
    model = build(wavlm_layer, decoder_folder, decoder_lora_rank=lora_rank)
    batches = [batch_of(model), batch_of(model, (3, 1), seed=1)]
    before = {name: digest(tensor) for name, tensor in tensors_of(model).items()}
    config = model.decoder.config.to_dict()
    found = block_losses(model.decoder, BLOCKS, [model.inputs_for(batch) for batch in batches])
    assert {name: digest(tensor) for name, tensor in tensors_of(model).items()} == before
    assert model.decoder.config.to_dict() == config
    assert found.full == sum(float(model(batch).loss) for batch in batches)
    labels = sum(len(ids) + 1 for batch in batches for ids in batch.target_ids)
    assert found.num_labels == labels and list(found.total) == BLOCKS
    for start, n in BLOCKS:
        with cut(model, PrunePlan(L, start, n)):
            naive = sum(float(model(batch).loss) for batch in batches)
        assert found.total[start, n] == naive, (start, n)
        assert found.mean[start, n] == naive / labels
    assert len(set(found.total.values())) == len(BLOCKS)  # no two blocks are the same


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_other_families(family: str) -> None:
    """Windows, two kinds of positions and soft caps: the rest of the decoder must know which layers it holds."""

    def make() -> Any:
        torch.manual_seed(0)
        decoder = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        tiny._spread_out(decoder)
        return decoder

    decoder = make()
    inputs = random_inputs(decoder, [11, 7])
    blocks = [(0, 2), (1, 3), (2, 1), (3, 2)]
    found = block_losses(decoder, blocks, [inputs])
    for start, n in blocks:
        small = make()
        remove_layers(small, start, n)
        naive = block_losses(small, [], [inputs]).full
        assert found.total[start, n] == naive, (start, n)


@torch.no_grad()
def test_a_resume_from_the_wrong_depth_is_noticed(qwen2: Path) -> None:
    """Going on from h[l+n], the full model's state after the block, would make every block look free."""
    decoder = AutoModelForCausalLM.from_pretrained(qwen2).eval()
    inputs = random_inputs(decoder, [9, 5])
    found = block_losses(decoder, [(1, 3)], [inputs])
    states: list[torch.Tensor] = []
    hook = decoder.model.layers[4].register_forward_pre_hook(lambda m, a: states.append(a[0]))
    assert block_losses(decoder, [], [inputs]).full == found.full
    hook.remove()
    rest = AutoModelForCausalLM.from_pretrained(qwen2).eval()
    remove_layers(rest, 0, 4)
    wrong = block_losses(rest, [], [inputs._replace(inputs_embeds=states[0])]).full
    assert wrong == found.full and wrong != found.total[1, 3]


def deep_decoder(num_layers: int = 28) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_a_quarter_of_the_layer_evaluations_at_28_layers_and_13_depths() -> None:
    """The candidates are those that the distances choose, as they are used."""
    decoder = deep_decoder()
    inputs = random_inputs(decoder, [9, 6, 4])
    distances = measure_distances(decoder, [inputs._asdict()])
    blocks = [(start, n) for start, n in best_blocks(distances.matrix, 4) if n <= 13]
    assert len(blocks) == 4 * 13
    calls = count_layers(decoder)
    found = block_losses(decoder, blocks, [inputs])
    shared = len(calls)
    assert shared == found.layer_evaluations == 28 + sum(28 - start - n for start, n in blocks)
    calls.clear()
    for start, n in blocks:
        small_calls = len(calls)
        naive = naive_loss(decoder, (start, n), inputs)
        assert len(calls) - small_calls == 28 - n
        assert found.total[start, n] == naive
    assert len(calls) >= 4 * shared


def naive_loss(decoder: Any, block: Block, inputs: DecoderInputs) -> float:
    from speechllm_prune.prune.surgery import Removal

    removal = Removal(decoder, *block)
    removal.apply()
    try:
        return block_losses(decoder, [], [inputs]).full
    finally:
        removal.undo()


def test_two_ranks_sum_what_one_process_sums(qwen2: Path, tmp_path: Path, repo_root: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = tiny.environment(repo_root) | {"WORLD_SIZE": "2", "MASTER_PORT": port}
    shared["MASTER_ADDR"] = "127.0.0.1"
    command = [sys.executable, "-m", "tests.numerics.two_ranks_losses", str(qwen2)]
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path / "found")],
            cwd=repo_root,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    alone = losses(qwen2, [0, 1])
    for rank in (0, 1):
        total, full, num_labels = torch.load(tmp_path / f"found.{rank}")
        assert total == pytest.approx(alone.total, rel=1e-12)
        assert full == pytest.approx(alone.full, rel=1e-12) and num_labels == alone.num_labels


NONSENSE: list[tuple[Block, str]] = [
    ((L - 2, 2), "contains the last layer"),
    ((0, L), "block_size 6 is outside"),
    ((-1, 2), "start_layer -1 is outside"),
]


@pytest.mark.parametrize(("block", "message"), NONSENSE)
def test_nonsense_is_refused(qwen2: Path, block: Block, message: str) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(qwen2).eval()
    with pytest.raises(UserError, match=message):
        block_losses(decoder, [block], [])
    with pytest.raises(UserError, match="there are no labels"):
        block_losses(decoder, [(0, 1)], [])


def test_a_failure_in_the_middle_leaves_the_decoder_whole(qwen2: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(qwen2).eval()
    inputs, config = random_inputs(decoder, [5]), decoder.config.to_dict()
    layers = list(decoder.model.layers)
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(0)
        if len(calls) > 1:
            raise ZeroDivisionError

    handle: Callable[[], None] = decoder.model.layers[5].register_forward_hook(fail).remove
    with pytest.raises(ZeroDivisionError):
        block_losses(decoder, [(1, 2)], [inputs])
    handle()
    assert list(decoder.model.layers) == layers and decoder.config.to_dict() == config
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(L))
