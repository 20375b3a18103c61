"""One truth: what READMEs, comments of leaves, run.sh and recipe lists tell about a leaf is what the leaf does,
what the tables of the paper hold, and what the estimate computes."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from speechllm_prune.models.estimate import table
from speechllm_prune.reporting.paper import TABLE2, removed_layers
from tests.conftest import REPO_ROOT
from tests.recipes.leaves import (
    ASR,
    AST,
    PAPER_LEAVES,
    SYSTEMS,
    TRAINED_LEAVES,
    VERBS,
    cells,
    commands_in,
    documents,
    head_of,
    loaded,
    path_of,
)
from tests.recipes.verbs import good

LARGE_BATCH = (
    "--lr 5e-4 --final_lr_share 0.02 --batch_positions 5750 --num_steps 13000 --heal_steps 1300"
)


# ---------------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("document", documents())
def test_every_command_shown_is_accepted(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leaf exists, every option is a key with a value of its type."""
    monkeypatch.chdir(REPO_ROOT)
    for verb, leaf, *arguments in commands_in(documents()[document]):
        if arguments[-1:] == ["..."]:
            arguments = [*arguments[:-1], "corpus"]
        if (
            verb == "train" and not arguments
        ):  # a table's cell, whose options stand in the text above it
            arguments = ["--data_folder", "corpus"]
        assert "ok" in good(verb, leaf, *arguments, "--check", "--results_folder", tmp_path).out


@pytest.mark.parametrize("document", documents())
def test_one_process_takes_two_micro_batches(document: str) -> None:
    """100,000 steps of 8 utterances: a command that trains a leaf of the paper in one process must say so."""
    for line in documents()[document].replace("\\\n", " ").splitlines():
        for verb, leaf, *arguments in commands_in(line, launched=True):
            if verb != "train" or Path(leaf).stem not in PAPER_LEAVES:
                continue
            processes = 1
            for factor in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", line):
                processes *= int(factor)
            doubled = "--grad_accumulation_factor 2" in " ".join(arguments)
            assert processes * (2 if doubled else 1) == 2, f"{document}: {line}"


def dry_run(corpus: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands that run.sh would run."""
    done = subprocess.run(
        ["bash", f"recipes/{corpus}/run.sh", "--dry_run", *arguments],
        cwd=REPO_ROOT,
        env=os.environ | {"PYTHON": "python"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines and all(line.startswith("+ ") for line in lines), done.stdout
    return [line.split()[1:] for line in lines]


def option(command: list[str], name: str) -> str:
    """Value of an option."""
    return command[command.index(name) + 1]


def steps_on(commands: list[list[str]], leaf: str) -> list[list[str]]:
    """[verb, arguments...] of the commands on a leaf, in order, without the launcher."""
    found = []
    for command in commands:
        if leaf in command:
            at = command.index(leaf)
            found.append([command[at - 1].removesuffix(".py"), *command[at + 1 :]])
    return found


def test_run_sh_tells_table_1() -> None:
    commands = dry_run("LibriSpeech", "--paper_blocks", "/data", LOQUACIOUS="/loquacious")
    assert commands[0][:2] == ["python", "recipes/Loquacious/loquacious_prepare.py"]
    assert option(commands[0], "--splits") == "dev"
    for name, model in ASR.items():
        leaf, system = f"hparams/librispeech_{name}.yaml", SYSTEMS[model]
        steps = steps_on(commands, leaf)
        assert [step[0] for step in steps] == ["train", "measure", "measure", "sweep"]
        assert option(steps[0], "--grad_accumulation_factor") == "2"
        assert option(steps[2], "--measure_input") == "text"
        n = removed_layers(system.drop, system.num_layers)
        assert option(steps[3], "--block_sizes") == str(n)
        assert option(steps[3], "--heal_modes") == "joint"
        # What run.sh sweeps is what the leaf's own comment tells.
        (told,) = {" ".join(c) for c in commands_in(documents()[leaf]) if c[0] == "sweep"}
        assert f"--block_sizes {n} --heal_modes joint" in told
    assert commands[-1][:2] == ["python", "report.py"]
    assert {path.split("/")[1] for path in commands[-1][2:]} == {f"librispeech_{n}" for n in ASR}


def test_run_sh_tells_table_2() -> None:
    commands = dry_run("CoVoST2", "/data")
    for name in AST:
        leaf = f"hparams/covost2_{name}_qwen7b.yaml"
        steps = steps_on(commands, leaf)
        assert [step[0] for step in steps] == ["train", "measure", "sweep", "sweep"]
        own, asr = steps[2:]
        told = [c for c in commands_in(documents()[leaf]) if c[0] == "sweep"]
        assert {option(c, "--block_sizes") for c in told} == {option(own, "--block_sizes")}
        assert option(own, "--block_sizes") == option(asr, "--block_sizes")
        path = option(asr, "--path")
        assert "--path" not in own and f"--path {path}" in head_of(Path(leaf).stem)
    assert option(commands[-1], "--tolerance") == "0.10"


def test_every_command_of_run_sh_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO_ROOT)
    checked = set()
    runs = [dry_run("CoVoST2", "/data"), dry_run("LibriSpeech", "--figure2", "/data")]
    for command in [step for commands in runs for step in commands]:
        script = next(word for word in command if word.endswith(".py"))
        if script.removesuffix(".py") in VERBS:
            leaf, *arguments = command[command.index(script) + 1 :]
            arguments += ["--results_folder", str(tmp_path), "--check"]
            good(script.removesuffix(".py"), leaf, *arguments)
            checked.add(Path(leaf).stem)
    assert checked == set(PAPER_LEAVES)


@pytest.mark.parametrize("gpus, batch", [(1, (4, 2)), (2, (4, 1)), (4, (2, 1)), (8, (1, 1))])
def test_run_sh_keeps_the_batch_whatever_the_number_of_gpus(
    gpus: int, batch: tuple[int, int]
) -> None:
    commands = dry_run("LibriSpeech", "/data", "llama1b", GPUS=str(gpus))
    train, *_, sweep = [c for c in commands if "hparams/librispeech_llama1b.yaml" in c]
    arguments = steps_on([train], "hparams/librispeech_llama1b.yaml")[0]
    hparams = loaded("librispeech_llama1b")
    pairs = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    size = int(pairs.get("--batch_size", hparams["batch_size"]))
    factor = int(pairs.get("--grad_accumulation_factor", hparams["grad_accumulation_factor"]))
    assert (size, factor) == batch and gpus * size * factor == 8
    launched = f"--nproc_per_node={gpus}"
    assert (launched in train) == (launched in sweep) == (gpus > 1), "healing has the same batch"


# ---------------------------------------------------------------------------------------------- lists and tables
COLUMNS = (
    "Task Dataset Script_file Hparam_file Data_prep_file Readme_file Result_url HF_repo test_debug_flags "
    "test_debug_checks performance"
).split()


def recipe_rows() -> list[dict[str, str]]:
    """Rows of tests/recipes/*.csv, the recipe lists in SpeechBrain's format."""
    rows = []
    for file in sorted((REPO_ROOT / "tests/recipes").glob("*.csv")):
        with open(file, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            assert list(reader.fieldnames or []) == COLUMNS
            found = list(reader)
        assert {row["Dataset"] for row in found} == {file.stem}
        rows += found
    return rows


def test_recipe_lists_hold_every_leaf_once() -> None:
    listed = [row["Hparam_file"] for row in recipe_rows()]
    leaves = {f"hparams/{name}.yaml" for name in [*TRAINED_LEAVES, "demo", "text"]}
    assert len(listed) == len(set(listed)) and leaves <= set(listed)
    assert all((REPO_ROOT / leaf).is_file() for leaf in listed)


@pytest.mark.parametrize("row", recipe_rows(), ids=lambda row: Path(row["Hparam_file"]).stem)
def test_recipe_lists_point_to_files_and_their_flags_work(
    row: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO_ROOT)
    for column in ("Script_file", "Data_prep_file", "Readme_file"):
        assert (REPO_ROOT / row[column]).is_file() or not row[column], row[column]
    flags = shlex.split(row["test_debug_flags"])
    verb = row["Script_file"].removesuffix(".py")
    good(verb, row["Hparam_file"], *flags, "--results_folder", tmp_path)
    assert "--check" in flags and not any(tmp_path.iterdir())
    name = Path(row["Hparam_file"]).stem.removeprefix("librispeech_")
    if name in ASR:
        assert cells(SYSTEMS[ASR[name]].unpruned) in row["performance"]


def test_tables_say_not_measured_until_it_is() -> None:
    """README columns `paper | ours`: the paper's cells are those of the data, ours are empty of numbers."""
    text = (REPO_ROOT / "recipes/LibriSpeech/README.md").read_text(encoding="utf-8")
    for name, model in ASR.items():
        system = SYSTEMS[model]
        n = removed_layers(system.drop, system.num_layers)
        rows = [line for line in text.splitlines() if f"`librispeech_{name}`" in line]
        full, pruned = (next(r for r in rows if cells(c) in r) for c in (system.unpruned, system.pruned))  # fmt: skip
        assert f"| {n} of {system.num_layers} ({system.drop} %) |" in pruned
        assert all(row.rstrip().endswith("| not measured |") for row in (full, pruned))

    text = (REPO_ROOT / "recipes/CoVoST2/README.md").read_text(encoding="utf-8")
    for name, (_, _, column) in AST.items():
        for row in TABLE2:
            removed = f"{removed_layers(row.drop, 28)} of 28 ({row.drop:g} %)"
            own, asr = row.ast_path[column], row.asr_path[column]
            line = f"| {removed} | {own:.2f} | not measured | {asr:.2f} | not measured |"
            assert f"| `covost2_{name}_qwen7b` {line}\n" in text
    text = (REPO_ROOT / "recipes/Loquacious/README.md").read_text(encoding="utf-8")
    for score in (SYSTEMS["Qwen2.5-7B"].unpruned[2], SYSTEMS["Qwen2.5-7B"].pruned[2]):
        assert f"| {score:.2f} | not measured |" in text


def test_reproducing_quotes_paper_and_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_ROOT)
    text = (REPO_ROOT / "docs/REPRODUCING.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    for row in table([f"hparams/{name}.yaml" for name in TRAINED_LEAVES]).splitlines():
        assert row in lines
    for name, model in ASR.items():
        system, leaf = SYSTEMS[model], f"hparams/librispeech_{name}.yaml"
        n = removed_layers(system.drop, system.num_layers)
        sweep = f"`sweep.py {leaf} --block_sizes {n} --heal_modes joint`"
        removed = f"{n} of {system.num_layers}"
        parts = [f"`train.py {leaf}`", cells(system.unpruned), sweep, removed]
        assert f"| {model} | {' | '.join(parts)} | {cells(system.pruned)} |" in lines
    for row in TABLE2:
        n = removed_layers(row.drop, 28)
        line = f"| {n} of 28 ({row.drop:g} %) | {cells(row.ast_path)} | {cells(row.asr_path)} |"
        assert line in lines


def test_the_large_batch_preset_is_a_command_line() -> None:
    """13,000 steps of 2 x 400 s; a second of audio takes 14.4 decoder positions."""
    assert f"`{LARGE_BATCH}`" in (REPO_ROOT / "docs/REPRODUCING.md").read_text(encoding="utf-8")
    options = LARGE_BATCH.split()
    good("train", path_of("librispeech_qwen7b"), *options, "--data_folder=x", "--check")
    positions, steps = (
        int(option(options, "--batch_positions")),
        int(option(options, "--num_steps")),
    )
    hours = 2 * positions / 14.4 * steps / 3600
    assert 2.8 < hours / 960 < 3.2
