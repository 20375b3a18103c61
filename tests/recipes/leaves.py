"""The leaves of the paper for the tests: which there are, what stands in them, and the commands that documents show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from speechllm_prune.hparams import load_hparams
from speechllm_prune.reporting.paper import TABLE1
from tests.conftest import REPO_ROOT

HPARAMS = REPO_ROOT / "hparams"
ASR = {
    "qwen7b": "Qwen2.5-7B",
    "qwen7b_lora": "Qwen2.5-7B + LoRA",
    "qwen3b": "Qwen2.5-3B",
    "qwen1.5b": "Qwen2.5-1.5B",
    "llama8b": "Llama-3.1-8B",
    "llama3b": "Llama-3.2-3B",
    "llama1b": "Llama-3.2-1B",
}
SYSTEMS = {system.model: system for system in TABLE1}
AST = {"ende": ("en", "de", 1), "fren": ("fr", "en", 0)}  # last: column in TABLE2
PAPER_LEAVES = [f"librispeech_{name}" for name in ASR] + [f"covost2_{name}_qwen7b" for name in AST]
TRAINED_LEAVES = [*PAPER_LEAVES, "minilibrispeech_qwen0.5b"]


def path_of(name: str) -> Path:
    """The leaf's file."""
    return HPARAMS / f"{name}.yaml"


def head_of(name: str) -> str:
    """The comment that a leaf opens with, on one line."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:count])


def loaded(name: str) -> dict[str, Any]:
    """The leaf with the base, without a network."""
    return load_hparams(path_of(name), {"data_folder": "corpus"})


def cells(values: Any) -> str:
    """Numbers as the comments and READMEs write them."""
    return " / ".join(f"{value:.2f}" for value in values)


DOCUMENTS = (
    "README.md",
    "docs/REPRODUCING.md",
    "recipes/LibriSpeech/README.md",
    "recipes/CoVoST2/README.md",
    "recipes/Loquacious/README.md",
)
VERBS = "train measure prune heal evaluate sweep".split()


def commands_in(text: str, launched: bool = False) -> list[list[str]]:
    """Every command on a leaf in a text: [verb, leaf, arguments...]; optional parts in brackets are left out.

    With `launched` only those that stand behind python or torchrun, complete as they are.
    """
    found = []
    before = r"(?:python|torchrun[^`|;\n]*?)\s+" if launched else r"\b"
    text = text.replace("\\\n", " ")
    for match in re.finditer(rf"{before}({'|'.join(VERBS)})\.py\s+(hparams/[^`#|;\n]*)", text):
        words = shlex.split(re.sub(r"\[[^]]*\]", "", match[2]).split("  (")[0])
        found.append([match[1], *words])
    return found


def documents() -> dict[str, str]:
    """Texts that show commands."""
    files = [REPO_ROOT / name for name in DOCUMENTS if (REPO_ROOT / name).is_file()]
    files += [path for path in HPARAMS.glob("*.yaml") if not path.stem.startswith("demo")]
    return {
        path.relative_to(REPO_ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files
    }
