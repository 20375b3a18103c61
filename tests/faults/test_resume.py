"""Rows 33 and 34: a run that died goes on as if nothing had happened, to the bit of every loss."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.faults.processes import Processes
from tests.recipes.conftest import MakeLeaf
from tests.recipes.verbs import tensors

pytestmark = pytest.mark.slow

# 12 utterances in batches of 4: a data pass ends after 3 micro-batches, a nominal epoch after 4 steps.
STEPS = ("--num_steps", 9, "--valid_interval", 4, "--eval_manifests", "[]", "--valid_utterances", 2)
RANDOM = {
    "decoder_lora_rank": 2,
    "decoder_lora_dropout": 0.3,
    "cache_features": False,
    "eval_batch_size": 1,
}


def losses(log: Path) -> dict[tuple[int, int], list]:
    """{(step, micro-batch): [utterances, bits of the loss]}; what was done twice must be the same twice."""
    found: dict[tuple[int, int], list] = {}
    for line in log.read_text().splitlines():
        step, micro, *rest = json.loads(line)
        assert found.setdefault((step, micro), rest) == rest, f"step {step} differs the second time"
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
def test_row_33_killed_between_steps(
    make_leaf: MakeLeaf, verbs: Processes, tmp_path: Path, accumulation: int
) -> None:
    """Dropout in the adapters, an encoder that draws random numbers, workers 0 and 2; killed and stopped on the way."""
    changes = RANDOM | {"grad_accumulation_factor": accumulation}
    whole = make_leaf(experiment_name="whole", **changes)
    verbs.run("train", whole.leaf, *STEPS, inject=[("log_losses", str(tmp_path / "whole"))])
    expected = losses(tmp_path / "whole")
    assert len(expected) == 9 * accumulation
    for workers in (0, 2):
        study = make_leaf(experiment_name=f"parted{workers}", **changes)
        log = tmp_path / f"parted{workers}"
        run = ("train", study.leaf, *STEPS, "--num_workers", workers)
        logged = ("log_losses", str(log))
        # Stopped between two steps, or in the first validation (the one after step 4); then killed after step 6.
        before_validation = ("signal_after_step", 3, signal.SIGTERM)
        in_validation = ("signal_in", "validation", 1, signal.SIGUSR1)
        stop = in_validation if workers else before_validation
        verbs.run(*run, code=75, inject=[logged, stop])
        kill = ("signal_after_step", 6, signal.SIGKILL)
        verbs.run(*run, code=-9, inject=[logged, kill])
        verbs.run(*run, inject=[logged])
        assert losses(log) == expected
        one, two = (tensors(s.root / "train") for s in (whole, study))
        assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_row_33_without_the_random_state_it_differs(
    make_leaf: MakeLeaf, verbs: Processes, tmp_path: Path
) -> None:
    """Dropout matters here: the same run with another random state after the restart has other losses."""
    study = make_leaf(**RANDOM)
    log = ("log_losses", str(tmp_path / "log"))
    kill = ("signal_after_step", 6, signal.SIGKILL)
    verbs.run("train", study.leaf, *STEPS, code=-9, inject=[log, kill])
    verbs.run("train", study.leaf, *STEPS, inject=[log, ("forget_random_state",)])
    with pytest.raises(AssertionError, match="differs the second time"):
        losses(tmp_path / "log")


def test_row_34_two_ranks(make_leaf: MakeLeaf, verbs: Processes, tmp_path: Path) -> None:
    """One rank is killed after step 6, which ends the other; each goes on with its own share and random state."""
    changes = RANDOM | {"batch_size": 2, "grad_accumulation_factor": 2}

    def run(name: str, *fault: tuple) -> list[int]:
        study = make_leaf(experiment_name=name, **changes)
        logs = [("log_losses", str(tmp_path / f"{name}{rank}")) for rank in range(2)]
        inject = [[logs[0]], [logs[1], *fault]]
        return [rank.code for rank in verbs.run_ranks("train", study.leaf, *STEPS, inject=inject)]

    assert run("whole") == [0, 0]
    assert run("parted", ("signal_after_step", 2, signal.SIGTERM)) == [75, 75]
    zero, one = run("parted", ("signal_after_step", 6, signal.SIGKILL))
    assert zero not in (0, 75) and one == -9
    assert run("parted") == [0, 0]
    for rank in range(2):
        expected = losses(tmp_path / f"whole{rank}")
        assert losses(tmp_path / f"parted{rank}") == expected and len(expected) == 18
    assert losses(tmp_path / "whole0") != losses(tmp_path / "whole1")
