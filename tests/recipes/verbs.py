"""Running the verbs in this process through `main(argv)` (an import of torch costs seconds), and looking at results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPO_ROOT

BASE = REPO_ROOT / "hparams" / "base" / "speechllm.yaml"
SPLITS = ("librispeech-test-clean", "librispeech-test-other")


@dataclass
class Outcome:
    """What a verb returned and printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one error message. Fails unless there is exactly one, without a traceback."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in self.err, self.err
        return errors[0].removeprefix("error: ")


def run(verb: str, *arguments: object) -> Outcome:
    """Call `main` of a verb; whatever it raises, the test sees."""
    out, err = io.StringIO(), io.StringIO()
    main = importlib.import_module(verb).main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def good(verb: str, *arguments: object) -> Outcome:
    """`run`, which must succeed."""
    outcome = run(verb, *arguments)
    assert outcome.code == 0, f"{verb} {arguments}: {outcome}"
    return outcome


def refused(verb: str, *arguments: object) -> str:
    """`run`, which must end as a user's mistake; returns its message."""
    outcome = run(verb, *arguments)
    assert outcome.code == 2, f"{verb} {arguments}: {outcome}"
    return outcome.message


def leaf_values(corpus: Path, encoder: Path, decoder: Path, results: Path) -> dict[str, Any]:
    """Keys of a leaf for tiny models."""
    return {
        "base": str(BASE),
        "experiment_name": "tiny",
        "data_folder": str(corpus),
        "results_folder": str(results),
        "train_manifests": ["librispeech/train-clean-100"],
        "valid_manifest": "librispeech/dev-clean",
        "measure_manifest": "librispeech/dev-clean",
        "eval_manifests": ["librispeech/test-clean", "librispeech/test-other"],
        "encoder_hub": str(encoder),
        "decoder_hub": str(decoder),
        "projector_dim": 32,
        "num_steps": 6,
        "valid_interval": 3,
        "heal_steps": 4,
        "batch_size": 4,
        "lr": 1.0e-3,
        "cache_features": True,
        "results_note": "tiny random models",
    }


def write_leaf(path: Path, values: dict[str, Any]) -> Path:
    """Write a leaf; a value of None leaves the key out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """{relative path: (time of change, sha256)} of every file."""
    return {
        file.relative_to(folder).as_posix(): (
            file.stat().st_mtime_ns,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def load_json(file: Path) -> dict[str, Any]:
    """Read JSON as any other program would."""
    return json.loads(file.read_text(encoding="utf-8"))


def load_rows(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def hypotheses(root: Path, variant: str, split: str = SPLITS[0]) -> dict[str, str]:
    """{utterance id: hypothesis} of a variant."""
    return {
        row["id"]: row["hyp"] for row in load_rows(root / "eval" / variant / split / "hyps.jsonl")
    }


def tensors(stage: Path) -> dict[str, Any]:
    """The trained tensors that a finished train or heal stage points to."""
    from safetensors.torch import load_file

    return load_file(stage / load_json(stage / "DONE.json")["checkpoint"] / "model.ckpt")


def audio_of(corpus: Path, utterance: str) -> Path:
    """The audio file of an utterance of the tiny corpus."""
    (file,) = (path for path in corpus.rglob(f"{utterance}.*"))
    return file
