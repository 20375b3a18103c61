"""Run several verbs one after another in one process, for torchrun: importing torch once is enough.

Arguments: a JSON list of commands, each a list of a verb and its arguments. `stop_at_N` in front of a verb sends
SIGTERM to the last rank alone after optimiser step N; all ranks must then stop, with exit code 75.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from unittest import mock

from speechllm_prune.brain import SpeechLLMBrain


@contextlib.contextmanager
def stopped_at(number: int) -> Iterator[None]:
    """Context: the last rank gets SIGTERM after an optimiser step."""
    original = SpeechLLMBrain.optimizers_step

    def step(brain: SpeechLLMBrain) -> None:
        original(brain)
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if is_last and brain.optimizer_step == number:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(SpeechLLMBrain, "optimizers_step", step):
        yield


def main() -> int:
    """Stop at the first command that ends otherwise than it should."""
    for command in json.loads(sys.argv[1]):
        first = command[0].partition("stop_at_")[2]
        verb, *arguments = command[1:] if first else command
        with stopped_at(int(first)) if first else contextlib.nullcontext():
            code = importlib.import_module(verb).main(arguments)
        if code != (75 if first else 0):
            print(f"{command}: exit code {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
