"""The feature store: what was written comes back, bit for bit, and half a store is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speechllm_prune.data.batching import Batch, collate
from speechllm_prune.data.features import FeatureStore, store_fingerprint, write_store
from speechllm_prune.models.encoder import load_encoder


def batches(lengths: list[list[int]]) -> list[Batch]:
    found = []
    for part in lengths:
        items = [
            {"id": f"u{n}", "audio": torch.randn(n), "target_ids": [], "text": "", "duration": 1.0}
            for n in part
        ]
        found.append(collate(items))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(encoder_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = load_encoder(str(encoder_folder), dtype=dtype)
    parts = batches([[9000, 31000, 16001], [12345]])
    write_store(tmp_path / "store", encoder, parts)
    store = FeatureStore(tmp_path / "store")
    for part in parts:
        features, lengths = encoder(part.audio, part.audio_lengths)
        for name, frames, length in zip(part.ids, features, lengths, strict=True):
            found = store.read(name)
            assert found.dtype == dtype and found.shape == (length, encoder.output_size)
            assert torch.equal(found, frames[:length])
            assert name in store
    assert "u1" not in store
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == [
        "features.bin",
        "index.json",
    ]
    size = (tmp_path / "store" / "features.bin").stat().st_size
    frames = sum(n for _, n in store.where.values())
    assert size == frames * encoder.output_size * dtype.itemsize  # nothing of the padding


def test_what_is_read_does_not_write_through(wavlm_layer: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(wavlm_layer))
    write_store(tmp_path / "store", encoder, batches([[9000]]))
    store = FeatureStore(tmp_path / "store")
    before = store.read("u9000").clone()
    store.read("u9000").zero_()
    assert torch.equal(store.read("u9000"), before)


def test_an_interrupted_store_leaves_nothing(wavlm_layer: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(wavlm_layer))

    def failing():
        yield from batches([[9000]])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", encoder, failing())
    assert list(tmp_path.iterdir()) == []
    assert not FeatureStore.exists(tmp_path / "store")


def test_a_second_writer_does_not_disturb_the_first(wavlm_layer: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(wavlm_layer))
    write_store(tmp_path / "store", encoder, batches([[9000]]))
    before = FeatureStore(tmp_path / "store").read("u9000")
    write_store(tmp_path / "store", encoder, batches([[9000]]))  # other noise under the same name
    assert torch.equal(FeatureStore(tmp_path / "store").read("u9000"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_fingerprint_changes_with_everything_that_changes_features() -> None:
    summary = {"sha256": "csv", "data_root": "here", "fingerprint": "sizes", "hours": 1.0}
    arguments = ("encoder", "none", torch.float32, summary)
    others = [
        ("other", "none", torch.float32, summary),
        ("encoder", "layer", torch.float32, summary),
        ("encoder", "none", torch.bfloat16, summary),
        ("encoder", "none", torch.float32, summary | {"sha256": "other"}),
        ("encoder", "none", torch.float32, summary | {"data_root": "there"}),
        ("encoder", "none", torch.float32, summary | {"fingerprint": "other"}),
    ]
    names = [store_fingerprint(*each) for each in (arguments, *others)]
    assert len(set(names)) == 7 and names[0] == store_fingerprint(*arguments)
