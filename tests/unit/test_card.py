"""What an export says of itself: model card, mergekit YAML, memory of several tasks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from speechllm_prune.experiment import Experiment, Variant, sha256_file, write_json
from speechllm_prune.prune.card import kept_ranges, memory_of_tasks, mergekit_yaml, model_card
from speechllm_prune.stages.export import results_of

RESULT: dict[str, Any] = {
    "eval_set": "demo-test",
    "metric": "wer",
    "value": 12.5,
    "full_value": 10.0,
    "relative_degradation": 0.25,
    "num_utterances": 7,
    "precision": "float32",
}
MERGE = {
    "max_logit_difference": 0.0211,
    "max_logit": 9.5,
    "same_best_token": 0.984375,
    "positions": 64,
    "dtype": "bfloat16",
}


def part(parameters: int) -> dict[str, int]:
    return {"parameters": parameters, "bytes": 4 * parameters}


def task(name: str, encoder: str, adapter: int = 5) -> dict[str, Any]:
    """An entry of a folder of several tasks."""
    return {
        "name": name,
        "task": name.split("-")[0],
        "prompt": f"Do {name}.",
        "text_case": "lower",
        "folder": f"adapters/{name}",
        "adapter": True,
        "encoder": {"hub": f"org/{encoder}", "revision": None, "fingerprint": encoder},
        "encoder_output_norm": "none",
        "frame_stack": 5,
        "variant": "l02n02-joint",
        "parts": {"encoder": part(100), "projector": part(10), "adapter": part(adapter)},
        "merge": MERGE,
        "results": [RESULT],
        "note": "random models",
    }


def card(*tasks: dict[str, Any]) -> dict[str, Any]:
    """speechllm.json of several tasks."""
    return {
        "schema": 1,
        "package_version": "0.1",
        "git_commit": "abc",
        "adapters": "separate",
        "decoder_hub": "org/decoder",
        "decoder_revision": "v1",
        "decoder_fingerprint": "org/decoder@v1",
        "decoder": part(1000) | {"dtype": "float32"},
        "num_layers": 6,
        "kept_layers": [0, 1, 4, 5],
        "tasks": list(tasks),
    }


@pytest.mark.parametrize(
    ("kept", "ranges"),
    [
        ([2, 3, 4, 5], [[2, 6]]),  # a block at the front or at the end leaves no empty range
        ([0, 1, 2], [[0, 3]]),
        ([0, 3, 4, 5], [[0, 1], [3, 6]]),
        ([0, 1, 2, 3, 4, 5], [[0, 6]]),
    ],
)
def test_the_mergekit_yaml_has_half_open_ranges(kept: list[int], ranges: list[list[int]]) -> None:
    found = yaml.safe_load(mergekit_yaml("org/x", "v1", "org/x@v1", kept, "bfloat16"))
    sources = [piece["sources"][0] for piece in found["slices"]]
    assert [source["layer_range"] for source in sources] == ranges
    assert {source["model"] for source in sources} == {"org/x@v1"}
    assert found["merge_method"] == "passthrough" and found["dtype"] == "bfloat16"
    layers = [layer for source in sources for layer in range(*source["layer_range"])]
    assert layers == kept
    inclusive = [layer for first, end in kept_ranges(kept) for layer in range(first, end + 1)]
    assert inclusive != kept  # reading the ranges as inclusive takes layers that were removed


def test_a_local_folder_is_not_given_away(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "decoder"
    folder.mkdir(parents=True)
    text = mergekit_yaml(str(folder), None, "sha256:12", [0], "float32")
    assert "secret" not in text and "model: decoder\n" in text and "sha256:12" in text


def test_the_card_holds_what_was_measured_and_says_what_was_not() -> None:
    missing = dict.fromkeys(("value", "relative_degradation", "precision")) | {
        "eval_set": "demo-other"
    }
    entry = task("asr", "wavlm") | {"results": [RESULT, RESULT | missing]}
    text = model_card(card(entry))
    assert "| demo-test | WER | 10.00 | 12.50 | +25.0 % | 7 | float32 |" in text
    assert ("| demo-other | WER | 10.00 | not measured | not measured | 7 | not measured |") in text
    for fact in ("org/decoder, revision v1", "0 1 4 5", "removed: 2 to 3", "Do asr.", "0.021"):
        assert fact in text
    assert "> **Note:** random models" in text and "98.4 % of 64" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/decoder"
    assert front["pipeline_tag"] == "automatic-speech-recognition"
    nothing = model_card(card(task("asr", "wavlm") | {"results": [], "merge": None}))
    assert "| not measured |" in nothing and "No adapter" in nothing


def test_memory_counts_a_shared_encoder_once() -> None:
    shared = memory_of_tasks(card(task("asr", "wavlm"), task("ast", "wavlm", adapter=7)))
    assert shared["together"] == part(1000 + 100 + 2 * 10 + 5 + 7)
    assert shared["separate"] == part(2 * (1000 + 100 + 10))  # their adapters are merged
    own = memory_of_tasks(card(task("asr", "wavlm"), task("ast", "whisper")))
    assert own["together"] == part(1000 + 2 * (100 + 10 + 5))
    before = card(task("asr", "wavlm"))
    after = copy.deepcopy(before)
    memory_of_tasks(before)
    assert before == after


def metrics(experiment: Experiment, variant: str, value: float, metric: str) -> None:
    source = experiment.stage("train") / "DONE.json"
    record = {
        "metric": metric,
        "value": value,
        "num_utterances": 3,
        "precision": "float32",
        "inputs": {"train/DONE.json": sha256_file(source)},
    }
    write_json(experiment.stage(f"eval/{variant}/demo-test") / "metrics.json", record)


@pytest.mark.parametrize(("metric", "change"), [("wer", -0.25), ("bleu", 0.25)])
def test_results_are_those_of_this_model(tmp_path: Path, metric: str, change: float) -> None:
    experiment, variant = Experiment(tmp_path, "x", 1), Variant(2, 2, "joint")
    write_json(experiment.stage("train") / "DONE.json", {"trained": 1})
    (nothing,) = results_of(experiment, variant, ["demo-test"])
    assert nothing["value"] is None and nothing["full_value"] is None
    metrics(experiment, "full", 40.0, metric)
    metrics(experiment, variant.name, 30.0, metric)
    (result,) = results_of(experiment, variant, ["demo-test"])
    assert result["value"] == 30.0 and result["full_value"] == 40.0
    assert result["relative_degradation"] == pytest.approx(change)  # positive is worse
    write_json(experiment.stage("train") / "DONE.json", {"trained": 2})  # trained again since
    (stale,) = results_of(experiment, variant, ["demo-test"])
    assert stale["value"] is None and stale["full_value"] is None
