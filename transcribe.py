#!/usr/bin/env python3
"""Transcribe audio with an exported model (full, pruned, healed, or several tasks on one pruned decoder).

    python transcribe.py results/demo/3407/heal/l04n06-joint/export recording.flac [more.wav ...]
    python transcribe.py EXPORT_FOLDER FOLDER_OF_AUDIO list_of_files.txt --task ast

AUDIO is a file of any rate, a folder (all audio files in and below it), or a list (.txt, .lst, .list: a path per line,
relative to the list). Prints one line per file: name, tab, text. What cannot be transcribed is named at the end (exit
code 2).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from speechllm_prune.runtime import UserError, verb

BATCHES_AT_ONCE = 16
"""Audio of so many batches is in memory together: enough to sort by length."""


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    parser = argparse.ArgumentParser(
        "transcribe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("export_folder", help="written with --export, or its id on the hub")
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="files, folders, lists of files")
    parser.add_argument(
        "--task", help="asr, ast, or another name in the export (default: its first)"
    )
    parser.add_argument(
        "--jsonl", action="store_true", help='a line of JSON per file: {"audio": ..., "text": ...}'
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be above 0, given {options.batch_size}")
    from transformers.utils.logging import disable_progress_bar

    from speechllm_prune.data.listing import expand_audio
    from speechllm_prune.inference import load_export

    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers, while it loads
    files = expand_audio(options.audio)
    model = load_export(options.export_folder, options.device)
    if options.task is not None:
        model.use_task(options.task)
    problems = {file: problem for file in files if (problem := what_is_wrong(model, file))}
    files = [file for file in files if file not in problems]
    step = options.batch_size * BATCHES_AT_ONCE
    for first in range(0, len(files), step):
        chunk = files[first : first + step]
        for name, text in zip(chunk, model.transcribe(chunk, options.batch_size), strict=True):
            line = {"audio": name, "text": text}
            plain = f"{name}\t{' '.join(text.split())}"
            print(json.dumps(line, ensure_ascii=False) if options.jsonl else plain, flush=True)
    if problems:
        raise UserError(f"not transcribed: {'; '.join(problems.values())}")
    return None


def what_is_wrong(model: Any, file: str) -> str:
    """Why a file cannot be transcribed, mostly from its header; "" if it can."""
    from speechllm_prune.data.audio import BadAudio, probe_audio
    from speechllm_prune.data.pipeline import read_audio
    from speechllm_prune.inference import SAMPLE_RATE, check_length

    try:
        try:
            check_length(model, round(probe_audio(file).duration * SAMPLE_RATE), file)
        except BadAudio as reason:
            check_length(model, len(read_audio(file)), file)
            return f"{file}: {reason}"
    except UserError as reason:
        return str(reason)
    return ""


if __name__ == "__main__":
    sys.exit(main())
