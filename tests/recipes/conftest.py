"""A finished study on tiny models, made once per session. Tests that change it work on a copy (`own_study`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.verbs import good, leaf_values, write_leaf


@dataclass
class Study:
    """An experiment and the leaf that made it."""

    leaf: Path
    values: dict[str, Any]
    corpus: Path
    results: Path

    @property
    def root(self) -> Path:
        """Folder of the experiment."""
        return self.results / self.values["experiment_name"] / "3407"

    def variant(self, block_size: int, mode: str = "joint") -> str:
        """Name of the variant that the experiment's own path gives."""
        from tests.recipes.verbs import load_json

        start = load_json(self.root / "measure/speech/path.json")["path"][str(block_size)]
        return f"l{start:02d}n{block_size:02d}-{mode}"


MakeLeaf = Callable[..., Study]


@pytest.fixture
def make_leaf(tiny_corpus: Path, wavlm_layer: Path, qwen2: Path, tmp_path: Path) -> MakeLeaf:
    """`make_leaf(**changes)` writes a leaf into the test's own folder; nothing has been run on it."""

    def make(**changes: Any) -> Study:
        values = leaf_values(tiny_corpus, wavlm_layer, qwen2, tmp_path / "results") | changes
        leaf = write_leaf(tmp_path / f"{values['experiment_name']}.yaml", values)
        return Study(leaf, values, tiny_corpus, Path(values["results_folder"]))

    return make


@pytest.fixture(scope="session")
def trained(
    tiny_corpus: Path, wavlm_layer: Path, qwen2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """Trained, evaluated, and measured on speech and on text."""
    folder = tmp_path_factory.mktemp("trained")
    values = leaf_values(tiny_corpus, wavlm_layer, qwen2, folder / "results")
    leaf = write_leaf(folder / "tiny.yaml", values)
    good("train", leaf)
    good("measure", leaf)
    good("measure", leaf, "--measure_input", "text")
    return Study(leaf, values, tiny_corpus, folder / "results")


@pytest.fixture(scope="session")
def study(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every verb has been run: read it, do not change it."""
    folder = tmp_path_factory.mktemp("study")
    copy = copy_study(trained, folder)
    good("prune", copy.leaf, "--block_size", 2, "--export")
    heal = ("heal", copy.leaf, "--block_size", 2)
    good(*heal, "--heal_mode", "joint", "--export")
    good(*heal, "--heal_mode", "decoder", "--tag", "long")
    good(*heal, "--heal_mode", "joint", "--control")
    for variant in (
        copy.variant(2, "none"),
        copy.variant(2, "joint"),
        copy.variant(2, "decoder") + "+long",
        "control-" + copy.variant(2, "joint"),
    ):
        good("evaluate", copy.leaf, "--variant", variant)
    good("evaluate", copy.leaf, "--shuffle_audio")
    good("sweep", copy.leaf, "--block_sizes", "1,2", "--heal_modes", "none,joint")
    good("report", copy.root)
    return copy


@pytest.fixture
def own_study(trained: Study, tmp_path: Path) -> Study:
    """A copy of `trained` that a test may change."""
    return copy_study(trained, tmp_path)


def copy_study(original: Study, folder: Path) -> Study:
    """Copy results elsewhere, with a leaf that names the new place: where results lie is no part of a configuration."""
    shutil.copytree(original.results, folder / "results")
    values = original.values | {"results_folder": str(folder / "results")}
    return Study(
        write_leaf(folder / "tiny.yaml", values), values, original.corpus, folder / "results"
    )
