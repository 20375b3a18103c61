"""docs/EXTENDING.md does what it says: every block is run as it is printed, in a folder that looks like this
repository after `make demo`, with tiny models in the place of the demo's."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import recipes
from speechllm_prune.data.manifest import read_manifest
from tests import tiny
from tests.conftest import REPO_ROOT
from tests.recipes.conftest import MakeLeaf
from tests.recipes.leaves import VERBS
from tests.recipes.verbs import (
    SPLITS,
    good,
    leaf_values,
    load_json,
    refused,
    tensors,
)

PAGE = (REPO_ROOT / "docs/EXTENDING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    text.split("\n", 1)[0]: BLOCK.findall(text) for text in re.split(r"^## ", PAGE, flags=re.M)[1:]
}
MADE_BEFORE = "recipes/Demo/bootstrap.py"
"""Takes minutes: the fixture has made what it makes (and tests/recipes/test_demo_bootstrap.py runs it)."""


@pytest.fixture(scope="module")
def place(
    tiny_corpus: Path,
    wavlm_layer: Path,
    qwen2: Path,
    llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The folder to work in, as the current one, with a trained and measured experiment `demo`."""
    place = tmp_path_factory.mktemp("extending")
    stand_ins = place / "results" / "stand_ins"
    for source, target in {
        wavlm_layer: "demo/encoder",
        qwen2: "demo/decoder",
        llama: "llama/decoder",
    }.items():
        shutil.copytree(source, stand_ins / target)
    shutil.copytree(REPO_ROOT / "hparams/base", place / "hparams/base")
    values = leaf_values(
        tiny_corpus,
        Path("results/stand_ins/demo/encoder"),
        Path("results/stand_ins/demo/decoder"),
        Path("results"),
    )
    values |= {"base": "base/speechllm.yaml", "experiment_name": "demo"}
    (place / "hparams/demo.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(place)
        patch.setattr(recipes, "__path__", [*recipes.__path__, str(place / "recipes")])
        good("train", "hparams/demo.yaml")
        good("measure", "hparams/demo.yaml")
        yield place


def execute(section: str, place: Path, replace: dict[str, str]) -> None:
    """Write the files of a section and run its commands, in the order of the page."""
    for language, text in SECTIONS[section]:
        if language == "diff":
            break  # what follows is for a changed copy of the package
        for old, new in replace.items():
            text = text.replace(old, new)
        name = text.split("\n", 1)[0].removeprefix("# ")
        if language == "bash":
            for line in text.splitlines():
                run_line(line)
            continue
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if language == "yaml":
            demo = yaml.safe_load((place / "hparams/demo.yaml").read_text())
            ours = {line.split(":")[0] for line in text.splitlines()}
            kept = {key: value for key, value in demo.items() if key not in ours}
            text = yaml.safe_dump(kept) + text
        file.write_text(text, encoding="utf-8")
        if language == "python" and not any(name in text for _, text in SECTIONS[section][1:]):
            runpy.run_path(str(file))  # a block that no command runs checks itself


def run_line(line: str) -> None:
    """A command as a shell would run it, but in this process."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    if script == MADE_BEFORE:
        return
    if script.removesuffix(".py") in VERBS:
        good(script.removesuffix(".py"), *arguments)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "path", [*sys.path])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as done:
            assert not done.code, line


def stage(experiment: str, name: str = "train") -> Path:
    return Path("results") / experiment / "3407" / name


def test_every_block_is_run() -> None:
    """No block stands outside the sections that the tests below name."""
    blocks = [block for found in SECTIONS.values() for block in found]
    assert blocks == BLOCK.findall(PAGE) and {
        name for name, found in SECTIONS.items() if found
    } == {
        "Another backbone",
        "Another corpus",
        "Another optimiser, schedule, projector or activation",
        "Another selector of blocks",
        "Another heal mode",
    }
    assert {language for language, _ in blocks} == {"bash", "python", "yaml", "diff"}


@pytest.mark.slow
def test_backbone(place: Path) -> None:
    execute("Another backbone", place, {})
    assert load_json(stage("demo_llama", "measure/speech") / "path.json")["num_layers"] == 6
    assert load_json(place / "results/stand_ins/lower/config.json")["num_hidden_layers"] == 1
    assert tensors(stage("demo_lower")).keys() == tensors(stage("demo")).keys()


@pytest.mark.slow
def test_corpus(place: Path, tiny_manifests: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "mine"
    corpus.mkdir()
    for split, theirs in {
        "train": "train-clean-100",
        "dev": "dev-clean",
        "test": "test-clean",
    }.items():
        rows = read_manifest(tiny_manifests / "librispeech" / f"{theirs}.csv")
        lines = [f"{Path(row.wav).name}\t{row.text}\n" for row in rows]
        for row in rows:
            shutil.copy(row.wav, corpus)
        (corpus / f"{split}.tsv").write_text("".join(lines))
    (place / "recipes/Mine").mkdir(parents=True)
    (place / "recipes/Mine/__init__.py").touch()
    execute("Another corpus", place, {"/path/to/mine": str(corpus)})
    assert load_json(place / "results/manifests/mine/train.json")["counts"]["utterances"] == 12
    assert load_json(stage("mine", "eval/full/mine-test") / "metrics.json")["num_utterances"] == 4
    (corpus / "test.tsv").unlink()
    lost = refused(
        "train", "hparams/mine.yaml", "--data_folder", tmp_path, "--experiment_name", "lost"
    )
    assert "no split 'train'" in lost


@pytest.mark.slow
def test_parts(place: Path) -> None:
    execute("Another optimiser, schedule, projector or activation", place, {})
    assert "projector.down.weight" in tensors(stage("parts"))
    archive = (stage("parts") / "hyperparams.yaml").read_text()
    assert "!name:my_parts.cosine" in archive and "!name:torch.optim.AdamW" in archive
    line = (stage("parts") / "train_log.txt").read_text().splitlines()[0]
    assert "step: 3, lr: 5.00e-04" in line, "half of the peak, after half of the steps"
    (healed,) = stage("parts", "heal").iterdir()
    assert "projector.inner.2.bias" in tensors(healed)
    message = refused("measure", "hparams/mine.yaml", "--experiment_name", "parts")
    assert "--allow_module my_parts" in message
    # What the page says of an export of such a projector.
    options = ("--allow_module", "my_parts", "--experiment_name", "parts", "--block_size", 2)
    good("heal", "hparams/mine.yaml", *options, "--export")
    audio = next(Path("results/manifests").rglob("test-clean.csv"))
    message = refused("transcribe", healed / "export", read_manifest(audio)[0].wav)
    assert "has a projector of its own (my_parts.Residual" in message


TENSORBOARD = "train_logger: !name:speechbrain.utils.train_logger.TensorboardLogger\n"


def test_tensorboard_is_an_optional_extra(
    make_leaf: MakeLeaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_leaf(num_steps=1, valid_interval=1, valid_utterances=1, eval_manifests=[])
    study.leaf.write_text(study.leaf.read_text() + TENSORBOARD)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
        for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
            patch.delitem(sys.modules, name)
        assert "pip install -e '.[tensorboard]'" in refused("train", study.leaf)
    pytest.importorskip("tensorboard")
    good("train", study.leaf)
    assert list((study.root / "train/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_selector(place: Path) -> None:
    execute("Another selector of blocks", place, {})
    chosen = load_json(place / "results/late.json")["path"]
    assert set(chosen) == {"1", "2", "3"} and all(start >= 2 for start in chosen.values())
    for n in (1, 2):
        plan = load_json(stage("demo", f"prune/l{chosen[str(n)]:02d}n{n:02d}") / "plan.json")
        assert plan["path_sources"] == ["results/late.json"]


@pytest.mark.slow
def test_heal_mode(place: Path) -> None:
    execute("Another heal mode", place, {})
    found = {folder.name.split("-")[1] for folder in stage("demo", "heal").iterdir()}
    assert found == {"joint+rank2", "decoder+all"}


UNDO = """
from speechllm_prune.experiment import Experiment
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.restore import HealState, cut, restore

model = restore(Experiment("results", "demo", 3407), "full", device="cpu")
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
with cut(model, PrunePlan(6, 1, 2), HealState("norms", LoraSettings(4, 8, 0.0))) as names:
    parameters = dict(model.named_parameters())
    assert len(names) == 2
    for name in names:
        parameters[name].data += 1.0
after = model.state_dict()
assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
"""


@pytest.mark.slow
def test_new_heal_mode(place: Path, tmp_path: Path) -> None:
    """The changed lines, in a copy of the package."""
    *_, (language, diff), (_, commands) = SECTIONS["Another heal mode"]
    assert language == "diff"
    for folder in ("hparams", "results"):
        shutil.copytree(place / folder, tmp_path / folder)
    for file in REPO_ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(
        REPO_ROOT / "speechllm_prune",
        tmp_path / "speechllm_prune",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for change in diff.split("--- ")[1:]:
        name, *lines = change.splitlines()
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +")
        )
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has no such line any more:\n{old}"
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    for command in (shlex.split(commands)[1:], ["-c", UNDO]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=tiny.environment(tmp_path),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    root = tmp_path / stage("demo", "")
    for n in (1, 2):
        (healed,) = (root / "heal").glob(f"l??n{n:02d}-norms")
        names = {name.split(".", 4)[-1] for name in tensors(healed)}
        assert names == {"input_layernorm.weight", "post_attention_layernorm.weight"}
        assert load_json(root / f"eval/{healed.name}/{SPLITS[0]}/metrics.json")["value"] > 0
