"""Run several verbs one after another in one process, for torchrun: importing torch once is enough.

Arguments: a JSON list of commands, each a list of a verb and its arguments.
"""

from __future__ import annotations

import importlib
import json
import sys


def main() -> int:
    """Stop at the first command that does not succeed."""
    for verb, *arguments in json.loads(sys.argv[1]):
        code = importlib.import_module(verb).main(arguments)
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
