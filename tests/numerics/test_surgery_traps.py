"""Ways to remove layers that look right and are wrong: each is run, its damage is shown, and ours avoids it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Qwen2Config

from speechllm_prune.models.decoder import decoder_layers, load_decoder
from speechllm_prune.prune.surgery import check_cached_decoding, remove_layers
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.numerics.test_surgery import SIZES, rebuilt_with_fewer_layers

L = tiny.DECODER_LAYERS
START, SIZE = 0, 2  # layer 0 goes: nothing may be read from the slot of a layer that is gone
KEPT = [2, 3, 4, 5]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def sliding() -> Any:
    """A Qwen2 whose window is shorter than the test's sequences: three full layers, then three with the window."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=5, max_window_layers=3)
    decoder = AutoModelForCausalLM.from_config(config).eval()
    tiny._spread_out(decoder)
    return decoder


def ids_of(length: int = 12) -> Tensor:
    return torch.randint(3, 49, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def cached(decoder: Any, ids: Tensor) -> Tensor:
    """Logits of the last position, the tokens before it read one by one through the cache."""
    state = None
    for position in range(ids.shape[1]):
        output = decoder(ids[:, position : position + 1], past_key_values=state, use_cache=True)
        state = output.past_key_values
    return output.logits[:, -1]


@torch.no_grad()
def whole(decoder: Any, ids: Tensor) -> Tensor:
    return decoder(ids, use_cache=False).logits[:, -1]


def slice_only(decoder: Any, kept: list[int], renumber: int | None = None) -> None:
    """The step that every wrong way has in common; `renumber` is the first layer's new number."""
    decoder.model.layers = nn.ModuleList([decoder.model.layers[index] for index in kept])
    if renumber is not None:
        for index, layer in enumerate(decoder.model.layers, start=renumber):
            layer.self_attn.layer_idx = index


def test_slicing_only_the_list_saves_a_checkpoint_with_random_layers(
    decoder_folder: Path, tmp_path: Path
) -> None:
    wrong, right, ids = load(decoder_folder), load(decoder_folder), ids_of()
    slice_only(wrong, KEPT)
    remove_layers(right, START, SIZE)
    expected = whole(right, ids)
    assert torch.equal(whole(wrong, ids), expected)  # in memory nothing shows
    wrong.save_pretrained(tmp_path / "wrong")
    reloaded = load(tmp_path / "wrong")  # and nothing is raised
    assert len(reloaded.model.layers) == L
    assert (whole(reloaded, ids) - expected).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="num_hidden_layers says 6"):
        check_cached_decoding(wrong)
    with pytest.raises(UserError, match="has 4 layers and a config of 6"):
        remove_layers(wrong, 0, 1)
    tokenizer = tiny.make_tokenizer(bos=False)
    tokenizer.save_pretrained(tmp_path / "wrong")
    with pytest.raises(UserError, match="weights and config.json do not fit"):
        load_decoder(str(tmp_path / "wrong"))


def test_without_renumbering_cached_decoding_is_silently_wrong(decoder_folder: Path) -> None:
    wrong, right, ids = load(decoder_folder), load(decoder_folder), ids_of()
    slice_only(wrong, KEPT)
    remove_layers(right, START, SIZE)
    expected = whole(right, ids)
    assert (cached(wrong, ids) - expected).abs().max() > 0.05  # its length is read from slot 0
    torch.testing.assert_close(cached(right, ids), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="caches in slot 2"):
        check_cached_decoding(wrong)


@pytest.mark.parametrize("first", [None, 1], ids=["not renumbered", "renumbered from 1"])
def test_a_new_depth_with_old_numbers_has_no_slot_in_the_cache(
    decoder_folder: Path, first: int | None
) -> None:
    wrong, ids = load(decoder_folder), ids_of()
    slice_only(wrong, KEPT, renumber=first)
    wrong.config.num_hidden_layers = len(KEPT)
    if getattr(wrong.config, "layer_types", None):
        wrong.config.layer_types = wrong.config.layer_types[: len(KEPT)]
    reference = rebuilt_with_fewer_layers(load(decoder_folder), KEPT)
    assert torch.equal(whole(wrong, ids), whole(reference, ids))  # without a cache nothing shows
    with pytest.raises(IndexError):
        cached(wrong, ids)
    with pytest.raises(RuntimeError, match=r"layer 0 caches in slot|layer \d caches in slot"):
        check_cached_decoding(wrong)


def test_layer_types_that_are_not_cut_give_windows_to_the_wrong_layers() -> None:
    right, ids = sliding(), ids_of()
    wrong = copy.deepcopy(right)
    reference = rebuilt_with_fewer_layers(right, KEPT)
    slice_only(wrong, KEPT, renumber=0)
    wrong.config.num_hidden_layers = len(KEPT)
    expected = whole(reference, ids)
    remove_layers(right, START, SIZE)
    assert right.config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    assert right.config.max_window_layers == 1
    torch.testing.assert_close(cached(right, ids), expected, atol=1e-5, rtol=1e-4)
    assert (cached(wrong, ids) - expected).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="layer_types says 6"):
        check_cached_decoding(wrong)


def test_the_check_finds_kinds_in_another_order() -> None:
    """All counts fit, and cached decoding reads the same wrong kinds as a whole forward."""
    decoder, ids = sliding(), ids_of()
    remove_layers(decoder, 1, 2)
    expected = whole(decoder, ids)
    assert check_cached_decoding(decoder) < 1e-4
    decoder.config.layer_types = decoder.config.layer_types[::-1]
    assert (whole(decoder, ids) - expected).abs().max() > 0.01
    torch.testing.assert_close(cached(decoder, ids), whole(decoder, ids), atol=1e-5, rtol=1e-4)
    with pytest.raises(
        RuntimeError, match="layer 0 is full_attention and layer_types says sliding"
    ):
        check_cached_decoding(decoder)


def test_the_check_compares_logits(qwen2: Path) -> None:
    """A fault that no number shows: a layer that does something else when it reads a single token."""
    decoder = load(qwen2)
    layer = decoder.model.layers[2]
    layer.register_forward_hook(
        lambda m, a, output: output * (1.5 if output.shape[1] == 1 else 1.0)
    )
    with pytest.raises(RuntimeError, match="cached decoding differs from a whole forward by"):
        check_cached_decoding(decoder)


def test_the_check_finds_two_layers_that_share_a_slot(qwen2: Path) -> None:
    decoder = load(qwen2)
    decoder.model.layers[3].self_attn.layer_idx = 2
    with pytest.raises(RuntimeError, match="layer 3 caches in slot 2"):
        check_cached_decoding(decoder)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_layer_types_that_are_not_cut_cannot_be_saved(
    qwen2: Path, tmp_path: Path, family: str
) -> None:
    def build() -> Any:
        if family == "qwen2":
            return load(qwen2)
        return AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, sliding_window=5)).eval()

    wrong, right = build(), build()
    slice_only(wrong, KEPT, renumber=0)
    wrong.config.num_hidden_layers = len(KEPT)
    with pytest.raises(Exception, match="layer_types|num_hidden_layers"):
        wrong.save_pretrained(tmp_path / "wrong")
    remove_layers(right, START, SIZE)
    right.save_pretrained(tmp_path / "right")
    assert len(decoder_layers(load(tmp_path / "right"))) == len(KEPT)


def test_reducing_only_the_depth_drops_the_last_layers(decoder_folder: Path) -> None:
    wrong, right, ids = load(decoder_folder), load(decoder_folder), ids_of()
    wrong.config.num_hidden_layers = len(KEPT)
    remove_layers(right, START, SIZE)
    last_gone = rebuilt_with_fewer_layers(load(decoder_folder), [0, 1, 2, 3])
    assert torch.equal(whole(wrong, ids), whole(last_gone, ids))
    assert (whole(wrong, ids) - whole(right, ids)).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="num_hidden_layers says 4"):
        check_cached_decoding(wrong)


def test_a_smaller_config_loads_the_first_layers_of_a_whole_checkpoint(
    decoder_folder: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(decoder_folder)
    config.num_hidden_layers = len(KEPT)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(KEPT)]
    wrong, ids = load(decoder_folder, config=config), ids_of()  # nothing is raised
    right = load(decoder_folder)
    remove_layers(right, START, SIZE)
    assert (whole(wrong, ids) - whole(right, ids)).abs().max() > 0.1
    folder = tmp_path / "mixed"
    load(decoder_folder).save_pretrained(folder)
    config.save_pretrained(folder)
    tiny.make_tokenizer(bos=False).save_pretrained(folder)
    with pytest.raises(UserError, match="weights and config.json do not fit"):
        load_decoder(str(folder))


def test_casting_a_model_also_casts_its_rotation_table(
    decoder_folder: Path, tmp_path: Path
) -> None:
    """`.to(bfloat16)` before saving: the weights are right, the logits in memory are not those after loading."""
    ids = ids_of(40)
    wrong = load(decoder_folder).to(torch.bfloat16)
    assert wrong.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    wrong.save_pretrained(tmp_path / "wrong")
    again = load(tmp_path / "wrong", dtype=torch.bfloat16)
    assert not torch.equal(whole(wrong, ids), whole(again, ids))
    right, _ = load_decoder(str(decoder_folder), dtype=torch.bfloat16)
    assert right.model.rotary_emb.inv_freq.dtype == torch.float32
    remove_layers(right, START, SIZE)
    right.save_pretrained(tmp_path / "right")
    again = load(tmp_path / "right", dtype=torch.bfloat16)
    assert torch.equal(whole(right, ids), whole(again, ids))


CHECKED: list[Callable[[Any], None]] = [
    lambda decoder: decoder.train(),
    lambda decoder: decoder.model.layers[1].train(),
]


@pytest.mark.parametrize("prepare", CHECKED)
def test_the_check_leaves_the_decoder_as_it_was(
    qwen2: Path, prepare: Callable[[Any], None]
) -> None:
    decoder = load(qwen2)
    prepare(decoder)
    before = [(name, module.training) for name, module in decoder.named_modules()]
    check_cached_decoding(decoder)
    assert [(name, module.training) for name, module in decoder.named_modules()] == before


def test_gemma_2_says_what_it_needs(tmp_path: Path) -> None:
    """Its attention has a soft cap, which sdpa does not know: refused with the way out, and right with eager."""
    decoder = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, sliding_window=5))
    decoder.save_pretrained(tmp_path)
    tiny.make_tokenizer(bos=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--attention eager"):
        load_decoder(str(tmp_path))
    loaded, _ = load_decoder(str(tmp_path), attention="eager")
    assert loaded.config._attn_implementation == "eager"
