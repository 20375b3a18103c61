#!/usr/bin/env python3
"""Transcribe audio files with an exported model (full, pruned or healed).

    python transcribe.py results/demo/3407/heal/l04n06-joint/export recording.flac [more.wav ...] [--task asr|ast]

Prints one line per file: name, tab, text.
"""

from __future__ import annotations

import argparse
import sys

from speechllm_prune.runtime import UserError, verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    parser = argparse.ArgumentParser(
        "transcribe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("export_folder", help="written by prune.py or heal.py with --export")
    parser.add_argument("audio", nargs="+", help="audio files of any rate")
    parser.add_argument("--task", choices=["asr", "ast"], default=None)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default=None)
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be above 0, given {options.batch_size}")
    from speechllm_prune import SpeechLLM

    model = SpeechLLM.from_pretrained(options.export_folder, device=options.device)
    for name, text in zip(
        options.audio,
        model.transcribe(options.audio, options.batch_size, options.task),
        strict=True,
    ):
        print(f"{name}\t{text}")
    return None


if __name__ == "__main__":
    sys.exit(main())
