"""The scripted recipes: the whole table from one line, going on after a stop, and the SLURM job around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT
from tests.tiny import environment

RUN_SH = "recipes/LibriSpeech/run.sh"
SBATCH = "recipes/LibriSpeech/slurm.sbatch"


def script(path: Path, body: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def bash(
    *arguments: object, path: Path | None = None, **variables: object
) -> subprocess.CompletedProcess:
    """Run a recipe's script; `path` comes first on PATH."""
    env = os.environ | {name: str(value) for name, value in variables.items()}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    command = ["bash", *map(str, arguments)]
    return subprocess.run(command, cwd=REPO_ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_one_line_makes_a_row_of_the_table(
    tiny_corpus: Path, wavlm_layer: Path, llama: Path, tmp_path: Path
) -> None:
    """Real verbs, tiny models; a second time nothing is made again."""
    keys = f"--encoder_hub {wavlm_layer} --decoder_hub {llama} --num_steps 4 --valid_interval 2 --heal_steps 2"
    keys += (
        " --train_manifests librispeech/train-clean-100 --num_workers 0 --max_tokens_per_second 1.0"
    )
    line = ["--paper_blocks", tiny_corpus, "llama1b", "--", *keys.split()]
    variables = environment(REPO_ROOT) | {
        "RESULTS": str(tmp_path / "results"),
        "PYTHON": sys.executable,
    }
    done = bash(RUN_SH, *line, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    root = tmp_path / "results/librispeech_llama1b/3407"
    assert (root / "train/DONE.json").is_file() and (root / "measure/text/path.json").is_file()
    (healed,) = (path.name for path in (root / "heal").iterdir())
    assert healed.endswith("n01-joint")
    assert (root / f"eval/{healed}/librispeech-test-clean/metrics.json").is_file()
    assert (root / "report/table1.md").is_file()
    assert "loquacious/dev" in done.stderr, "what is missing is said"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("DONE.json")}
    again = bash(RUN_SH, *line, **variables)
    assert again.returncode == 0 and "already done" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("DONE.json")}


@pytest.mark.parametrize(
    "body, code",
    [
        ("exit 75", 75),
        ('mkdir -p "$R/x"; sleep 0.1; touch "$R/x/STOPPED.json"; exit 1', 75),  # as under torchrun
        ("exit 1", 1),
        ("exit 2", 2),
    ],
)
def test_codes_of_the_verbs_come_through(tmp_path: Path, body: str, code: int) -> None:
    results = tmp_path / "results"
    results.mkdir()
    stub = script(tmp_path / "python", f"R={results}; echo $1 >>{tmp_path}/calls; {body}")
    done = bash(RUN_SH, "/data", "llama1b", PYTHON=stub, RESULTS=results)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().split() == ["train.py"], "nothing is run after that"


def test_an_old_note_of_a_stop_makes_no_failure_resumable(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/STOPPED.json").write_text("{}")
    os.utime(tmp_path / "results/STOPPED.json", (1, 1))
    stub = script(tmp_path / "python", "exit 1")
    done = bash(RUN_SH, "/data", "llama1b", PYTHON=stub, RESULTS=tmp_path / "results")
    assert done.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_command_once_and_is_waited_for(
    tmp_path: Path, number: signal.Signals
) -> None:
    body = f"trap 'echo told >>{tmp_path}/told; sleep 0.5; touch {tmp_path}/saved; kill $!; exit 75' TERM\n"
    stub = script(tmp_path / "python", body + f"touch {tmp_path}/started; sleep 60 & wait $!")
    env = os.environ | {"PYTHON": str(stub), "RESULTS": str(tmp_path / "results")}
    process = subprocess.Popen(
        ["bash", RUN_SH, "/data", "llama1b"], cwd=REPO_ROOT, env=env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "saved").exists() and (tmp_path / "told").read_text() == "told\n"


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "run.sh [OPTION...]"),
        (["/data", "qwen70b"], "unknown system 'qwen70b'"),
        (["--figure3", "/data"], "unknown option --figure3"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], word: str) -> None:
    done = bash(RUN_SH, *arguments)
    assert done.returncode == 2 and word in done.stderr


def test_a_number_of_gpus_that_changes_the_batch_is_refused() -> None:
    done = bash(RUN_SH, "--dry_run", "/data", GPUS=3)
    assert done.returncode == 2 and "1, 2, 4 or 8" in done.stderr


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, object]:
    """What SLURM sets for a job of one node and one GPU, with commands that only note how they were called."""
    script(tmp_path / "bin/scontrol", f'echo "$@" >>{tmp_path}/scontrol; echo first; echo second')
    script(tmp_path / "bin/srun", f'echo "$@" >>{tmp_path}/srun')
    return {
        "path": tmp_path / "bin",
        "PYTHON": tmp_path / "python",
        "RESULTS": tmp_path / "results",
        "SLURM_JOB_ID": 7,
        "SLURM_SUBMIT_DIR": REPO_ROOT,
        "SLURM_GPUS_ON_NODE": 1,
    }


@pytest.mark.parametrize("code, requeued", [(75, True), (1, False), (2, False), (0, False)])
def test_slurm_requeues_what_was_stopped_and_nothing_else(
    slurm: dict, tmp_path: Path, code: int, requeued: bool
) -> None:
    script(tmp_path / "python", f"exit {code}")
    done = bash(SBATCH, "/data", "llama1b", **slurm)
    assert done.returncode == (0 if requeued else code), done.stderr
    asked = tmp_path / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")


def test_slurm_on_two_nodes_starts_torchrun_on_both(slurm: dict, tmp_path: Path) -> None:
    script(tmp_path / "python", "exit 0")
    nodes = {"SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "nodes[1-2]"}
    done = bash(SBATCH, "/data", "llama1b", **slurm, **nodes)
    assert done.returncode == 0, done.stderr
    train, sweep = (tmp_path / "srun").read_text().splitlines()
    for line in (train, sweep):
        assert "torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=7" in line
        assert "--rdzv_endpoint=first:20007" in line
    assert "train.py" in train and "--grad_accumulation_factor" not in train and "sweep.py" in sweep
