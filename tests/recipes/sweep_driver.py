"""Kill sweeps: fork, run `sweep.py` in the child, SIGKILL it after a while, look at what is finished, and again.

Arguments: a JSON object with `whole` and `parted` (arguments of two sweeps that differ in the folder alone), `root` (of
the second one's experiment), `seed` and `kills`. Torch is imported once, so that a start costs little. Prints a JSON
object with what stood finished after every start: {file: [time of change, inode]}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import sweep
from speechllm_prune import sweep_coarse  # noqa: F401  (and with it torch)


def start(arguments: list[str]) -> int:
    """Run a sweep in a child; returns its process id."""
    process = os.fork()
    if process == 0:
        os._exit(sweep.main(arguments))
    return process


def finished(root: Path) -> dict[str, list[int]]:
    """What is complete: scores, and healings."""
    files = [*root.glob("eval/*/*/metrics.json"), *root.glob("heal/*/DONE.json")]
    return {str(file): [file.stat().st_mtime_ns, file.stat().st_ino] for file in sorted(files)}


def main() -> int:
    """The undisturbed sweep first: how long it takes decides how long the others live."""
    task = json.loads(sys.argv[1])
    sys.stdout.flush()
    log = os.dup(1)
    os.dup2(2, 1)  # what the sweeps say goes to stderr
    began = time.monotonic()
    _, status = os.waitpid(start(task["whole"]), 0)
    seconds = time.monotonic() - began
    if status:
        return 1
    chance = random.Random(task["seed"])
    history, killed = [], 0
    while True:
        process = start(task["parted"])
        if killed < task["kills"]:
            time.sleep(chance.uniform(0, seconds / 3))
            os.kill(
                process, signal.SIGKILL
            )  # of one that has ended (and was not waited for) harmless
        _, status = os.waitpid(process, 0)
        history.append(finished(Path(task["root"])))
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    os.write(log, json.dumps({"code": status, "killed": killed, "history": history}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
