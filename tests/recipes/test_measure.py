"""measure.py on a LoRA baseline: adapters on by default, off on request, and neither result replaces the other."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import good, load_json, refused, snapshot

LAYERS = 6


def test_adapters_on_and_off(make_leaf: MakeLeaf, tmp_path: Path) -> None:
    study = make_leaf(decoder_lora_rank=4, lr=0.05)
    # Off, text mode measures the decoder of the hub: that needs no training.
    text = tmp_path / "sentences.txt"
    text.write_text("four green boxes\nthe old house\nseven little dogs stand near\n")
    options = ("--measure_input", "text", "--text_file", text)
    good("measure", study.leaf, *options, "--measure_lora", "False")
    plain = study.root / "measure/text-no_lora"
    assert load_json(plain / "path.json")["measure_lora"] is False
    assert "train/DONE.json" not in load_json(plain / "DONE.json")["inputs"]
    message = refused("measure", study.leaf, "--measure_lora", "False")
    assert f"python train.py {study.leaf}" in message
    good("train", study.leaf)
    good("measure", study.leaf)
    before = snapshot(study.root / "measure/speech")
    good("measure", study.leaf, "--measure_lora", "False")
    assert snapshot(study.root / "measure/speech") == before
    on, off = (study.root / "measure" / name for name in ("speech", "speech-no_lora"))
    records = [load_json(folder / "path.json") for folder in (on, off)]
    assert [record["measure_lora"] for record in records] == [True, False]
    assert [record["decoder_lora_rank"] for record in records] == [4, 4]
    arrays = [load_file(folder / "distances.safetensors") for folder in (on, off)]
    assert (arrays[0]["distance"] - arrays[1]["distance"]).nan_to_num().abs().max() > 1e-5
    assert "already done" in good("measure", study.leaf, "--measure_lora", "False").out
    out = good("report", study.root).out
    page = (study.root / "report/report.html").read_text()
    assert "speech-no_lora" in page and "adapters on and off" in page, out


def test_adapters_off_without_any_is_refused(make_leaf: MakeLeaf) -> None:
    message = refused("measure", make_leaf().leaf, "--measure_lora", "False")
    assert "decoder_lora_rank is 0" in message


def test_what_is_written_beside_the_distances(trained: Study) -> None:
    for kind in ("speech", "text"):
        folder = trained.root / "measure" / kind
        arrays, record = (
            load_file(folder / "distances.safetensors"),
            load_json(folder / "path.json"),
        )
        distance, influence = arrays["distance"], arrays["influence"]
        assert influence.dtype == torch.float64 and influence.shape == (LAYERS, LAYERS)
        assert torch.equal(influence.isnan(), distance.isnan())
        # 1 - cos of the mean angle is at most the mean of 1 - cos, where the angles are small enough to be convex.
        defined = distance[~distance.isnan()]
        bent = influence[~influence.isnan()]
        small = defined < 0.45
        assert (bent[small] >= 1 - torch.cos(torch.pi * defined[small]) - 0.02).all()
        assert arrays["distance_post_norm"].shape == (LAYERS,)
        assert not arrays["distance_post_norm"].isnan().any()
        shares = record["bootstrap_share"]
        assert list(shares) == list(record["path"]) and shares[str(LAYERS - 1)] == 1.0
        assert all(0 < share <= 1 for share in shares.values())
        assert record["measure_lora"] is True and record["decoder_lora_rank"] == 0
