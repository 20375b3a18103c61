"""Experiment folders written by the published schemas, with made-up numbers: what `report` reads, without any model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

NOTE = "made-up numbers of a test"
COMMON = {
    "schema": 1,
    "package_version": "0.0.0",
    "git_commit": "0" * 40,
    "config_hash": "c" * 64,
}
SETS = (("librispeech", "test-clean"), ("librispeech", "test-other"), ("loquacious", "dev"))
BASE_RATE = {"test-clean": 0.02, "test-other": 0.06, "dev": 0.12}
SLOPE = {"none": 5.0, "decoder": 1.6, "projector": 1.2, "joint": 0.4}
WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliet".split()
WORDS_PER_UTTERANCE = len(WORDS)


def write(path: Path, value: object) -> Path:
    """Write JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_point(
    seed_folder: Path,
    variant: str,
    corpus: str,
    split: str,
    errors: list[int],
    *,
    num_layers: int = 12,
    **changes: object,
) -> Path:
    """Write `eval/<variant>/<corpus>-<split>` with one substitution count per utterance of ten words."""
    folder = seed_folder / "eval" / variant / f"{corpus}-{split}"
    block = variant.partition("-l" if variant.startswith("control") else "l")[2]
    pruned = variant.startswith("l") and block[:2].isdigit()
    total = sum(errors)
    words = WORDS_PER_UTTERANCE * len(errors)
    record = COMMON | {
        "inputs": {f"manifests/{corpus}/{split}.csv": "d" * 64},
        "task": "asr",
        "variant": variant,
        "corpus": corpus,
        "split": split,
        "metric": "wer",
        "value": 100.0 * total / words,
        "num_utterances": len(errors),
        "num_layers": num_layers,
        "start_layer": int(block[:2]) if pruned else None,
        "block_size": int(block[3:5]) if pruned else 0,
        "heal_mode": variant.rpartition("-")[2].partition("+")[0] if block else "none",
        "tag": variant.partition("+")[2],
        "control": variant.startswith("control"),
        "experiment_name": seed_folder.parent.name,
        "seed": 1,
        "substitutions": total,
        "deletions": 0,
        "insertions": 0,
        "reference_words": words,
        "rtfx": 10.0,
        "peak_memory_bytes": None,
        "num_parameters": 1000,
        "decoder_parameters": 900,
        "num_capped": 0,
        "seconds": 1.0,
        "text_normaliser": "whisper_english",
        "note": NOTE,
    }
    rows = [
        {
            "id": f"{split}-{index:04d}",
            "ref": " ".join(WORDS),
            "hyp": " ".join(["x"] * count + WORDS[count:]),
            "duration": 2.0,
            "num_tokens": 10,
            "capped": False,
            "substitutions": count,
            "deletions": 0,
            "insertions": 0,
            "reference_words": WORDS_PER_UTTERANCE,
        }
        for index, count in enumerate(errors)
    ]
    write(folder / "metrics.json", record | changes)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hyps.jsonl").write_text(lines, encoding="utf-8")
    return folder


def draw_errors(rate: float, num_utterances: int, seed: int) -> list[int]:
    """Made-up error counts; the same seed and a higher rate give at least as many errors in every utterance."""
    uniform = np.random.default_rng(seed).random((num_utterances, WORDS_PER_UTTERANCE))
    return (uniform < rate).sum(axis=1).tolist()


def distance_matrix(num_layers: int, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A made-up matrix whose distances grow with block size and fall with depth, but for blocks that end at the top."""
    generator = np.random.default_rng(seed)
    matrix = np.full((num_layers, num_layers), np.nan)
    for n in range(1, num_layers + 1):
        for start in range(num_layers - n + 1):
            value = 0.04 * n**0.8 * (1.3 - start / num_layers)
            value += 0.15 if start + n == num_layers else 0.0
            value += 0.02 if start == num_layers - 1 - n and n % 3 == 0 else 0.0
            matrix[n - 1, start] = value + noise * generator.random()
    return matrix


def write_measurement(
    seed_folder: Path,
    measure_input: str,
    matrix: np.ndarray,
    post_norm: np.ndarray | None = None,
    **changes: object,
) -> None:
    """Write `measure/<measure_input>`, its path chosen here by brute force."""
    num_layers = len(matrix)
    path, margin = {}, {}
    for n in range(1, num_layers):
        order = sorted((matrix[n - 1, start], start) for start in range(num_layers - n))
        path[str(n)] = order[0][1]
        margin[str(n)] = order[1][0] - order[0][0] if len(order) > 1 else None
    folder = seed_folder / "measure" / measure_input
    record = COMMON | {
        "inputs": {},
        "measure_input": measure_input,
        "measure_manifest": "librispeech/dev-clean",
        "last_token": "sequence",
        "num_layers": num_layers,
        "count": 40,
        "decoder_hub": "made-up",
        "path": path,
        "margin": margin,
        "note": NOTE,
    }
    write(folder / "path.json", record | changes)
    tensors = {"distance": matrix.astype(np.float64), "count": np.array([40], dtype=np.int64)}
    if post_norm is not None:
        tensors["distance_post_norm"] = post_norm.astype(np.float64)
    save_file(tensors, folder / "distances.safetensors")


def write_experiment(
    seed_folder: Path,
    sizes: tuple[int, ...] = (2, 4, 6, 8),
    num_utterances: int = 120,
    num_layers: int = 12,
    sets: tuple[tuple[str, str], ...] = SETS,
) -> Path:
    """A complete experiment: training log, two measurements, points of all heal modes, control, sanity check."""
    log = [
        f"step: {step}, lr: 1.00e-03 - train loss: {loss:.2f}, train stats: x - valid loss: {loss:.2f}, "
        f"valid wer: {20 * loss:.2f}"
        for step, loss in ((50, 2.0), (100, 0.9), (150, 0.4))
    ]
    train = seed_folder / "train"
    write(train / "DONE.json", COMMON)
    (train / "train_log.txt").write_text("\n".join(log) + "\n", encoding="utf-8")
    matrix = distance_matrix(num_layers)
    write_measurement(seed_folder, "speech", matrix)
    write_measurement(seed_folder, "text", distance_matrix(num_layers, noise=0.02, seed=1))
    path = json.loads((seed_folder / "measure/speech/path.json").read_text())["path"]
    for index, (corpus, split) in enumerate(sets):

        def point(variant: str, factor: float, corpus=corpus, split=split, index=index) -> None:
            errors = draw_errors(min(0.9, BASE_RATE[split] * factor), num_utterances, seed=index)
            write_point(seed_folder, variant, corpus, split, errors, num_layers=num_layers)

        point("full", 1.0)
        for n in sizes:
            for mode, slope in SLOPE.items():
                point(f"l{path[str(n)]:02d}n{n:02d}-{mode}", 1.0 + slope * (n / num_layers) ** 2)
        last = sizes[-1]
        point(f"control-l{path[str(last)]:02d}n{last:02d}-joint", 0.95)
    write_point(
        seed_folder, "full+shuffled_audio", *sets[0], draw_errors(0.85, num_utterances, seed=9)
    )
    return seed_folder


def write_settings(seed_folder: Path, **keys: object) -> None:
    """Write the archived YAML (JSON is YAML) with the keys that a report reads."""
    settings = {
        "task": "asr",
        "tolerance": 0.25,
        "valid_manifest": "librispeech/dev-clean",
        "eval_manifests": [f"{corpus}/{split}" for corpus, split in SETS],
        "decoder_hub": "made-up",
        "decoder_lora_rank": 0,
    }
    write(seed_folder / "train" / "hyperparams.yaml", settings | keys)


def write_random_decoder(seed_folder: Path, num_layers: int = 12) -> Path:
    """An experiment with measurements only, of a decoder without training."""
    generator = np.random.default_rng(3)
    for measure_input in ("speech", "text"):
        matrix = distance_matrix(num_layers, noise=0.0)
        matrix = np.where(np.isnan(matrix), np.nan, 0.3 + 0.02 * generator.random(matrix.shape))
        write_measurement(seed_folder, measure_input, matrix)
    return seed_folder
