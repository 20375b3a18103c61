"""What every verb shares at its edges: user errors, exit codes, signals and seeds.

No heavy import here: `report.py` and `--help` must start without torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable

DONE, FAULT, USER_ERROR, STOPPED = 0, 1, 2, 75
"""Exit codes: finished (or already finished), a fault, a user's mistake, stopped by a signal and resumable."""


class UserError(Exception):
    """A mistake that the user can mend. The message says what was given, what is allowed and what to run next."""


class Stopped(Exception):
    """A signal asked the process to stop. The work so far is saved; running the command again resumes it."""


def verb(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Turn `main(argv)` of a command into one that reports mistakes in one message and returns an exit code.

    Arguments
    ---------
    main : callable
        Takes the list of command-line arguments, returns None or an exit code.

    Returns
    -------
    callable
        `main(argv=None) -> int`; `argv` defaults to `sys.argv[1:]`.

    Example
    -------
    >>> @verb
    ... def main(argv):
    ...     raise UserError("no such folder")
    >>> main([])
    2
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            with graceful_stop():
                return main(sys.argv[1:] if argv is None else list(argv)) or DONE
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR
        except SystemExit as leave:  # argparse: --help is 0, a wrong command line 2
            return leave.code if isinstance(leave.code, int) else DONE
        except (Stopped, KeyboardInterrupt) as reason:
            print(
                f"stopped: {reason or 'interrupted'}; run the same command again to resume",
                file=sys.stderr,
            )
            return STOPPED

    return wrapped


_stop_signal: str | None = None


class graceful_stop:
    """Context: the first SIGTERM or SIGUSR1 sets a flag that the loops poll, the second one exits at once.

    Outside the main thread (where Python refuses signal handlers) it does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> graceful_stop:
        global _stop_signal
        _stop_signal = None
        self._owner = os.getpid()
        try:
            self._previous = {
                number: signal.signal(number, self._handle) for number in self.SIGNALS
            }
        except ValueError:
            self._previous = {}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        global _stop_signal
        # A forked DataLoader worker inherits the handler: it must die as it would have without us.
        if os.getpid() != self._owner or _stop_signal is not None:
            os._exit(128 + number)
        _stop_signal = signal.Signals(number).name
        print(f"{_stop_signal} received: stopping at the next safe point", file=sys.stderr)


def stop_requested() -> str | None:
    """The name of the signal that asked to stop, or None."""
    return _stop_signal


def raise_if_stopped() -> None:
    """Raise `Stopped` when a signal has asked for it: for loops whose finished parts are already on disk."""
    if _stop_signal is not None:
        raise Stopped(_stop_signal)


def derive_seed(seed: int, stage: str, rank: int = 0) -> int:
    """One 31-bit seed from (seed, stage, rank), so that no stage depends on what ran before it.

    Example
    -------
    >>> derive_seed(1, "train") == derive_seed(1, "train")
    True
    >>> derive_seed(1, "train") == derive_seed(1, "heal")
    False
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{rank}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def seed_everything(seed: int, stage: str, rank: int = 0) -> int:
    """Seed Python, NumPy and torch from (seed, stage, rank). Returns the derived seed."""
    import numpy
    import torch

    derived = derive_seed(seed, stage, rank)
    random.seed(derived)
    numpy.random.seed(derived)
    torch.manual_seed(derived)
    return derived
