"""Which experiments a report is of, which of their results were made from what is no longer there, and what they say
of their healing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speechllm_prune.experiment import read_json, sha256_file
from speechllm_prune.runtime import UserError

STAGES = ("train", "measure", "prune", "heal", "eval")


def find_experiments(folders: Iterable[str | Path]) -> list[Path]:
    """Seed folders named by the command line: `results/<name>/<seed>`, or `results/<name>` for all seeds below.

    `--debug` runs (`<seed>-debug`) count only when named themselves; `results/report` of `results/*` is left out.

    Raises
    ------
    UserError
        If a folder is missing or holds no stage of an experiment.
    """
    found: list[Path] = []
    named = list(map(Path, folders))
    for folder in named:
        if not folder.is_dir():
            raise UserError(
                f"experiment folder {folder} does not exist; make it with: "
                "python train.py LEAF.yaml --data_folder FOLDER (the demo: make demo)"
            )
        if any((folder / stage).is_dir() for stage in STAGES):
            seeds = [folder]
        else:
            seeds = [
                child
                for child in sorted(folder.iterdir())
                if not child.name.endswith("-debug")
                and any((child / stage).is_dir() for stage in STAGES)
                and child.name.isdigit()
            ]
        if not seeds and folder.name == "report" and len(named) > 1:
            print(f"note: {folder} is a report and no experiment: left out", file=sys.stderr)
        elif not seeds:
            raise UserError(
                f"{folder} holds no experiment (no {', '.join(STAGES)} in it or in a <seed> folder below); "
                "give results/<experiment_name> or results/<experiment_name>/<seed>, and run first: "
                "python train.py LEAF.yaml --data_folder FOLDER"
            )
        found += [
            seed for seed in seeds if seed.resolve() not in {known.resolve() for known in found}
        ]
    return found


def evaluate_command(variant: str) -> str:
    """The command that evaluates a variant.

    Example
    -------
    >>> evaluate_command("full+shuffled_audio")
    'python evaluate.py LEAF.yaml --shuffle_audio True'
    """
    what = "--shuffle_audio True" if variant.startswith("full+") else f"--variant {variant}"
    return f"python evaluate.py LEAF.yaml {what}"


def changed_inputs(folder: Path, record: dict[str, Any]) -> list[str]:
    """The stages that a result was made from and that have been made again since: it tells of another model.

    Only what lies in the experiment itself, so that a results folder may be moved; a plan does not count, as in
    `Experiment.check_inputs`.

    Arguments
    ---------
    folder : Path
        The experiment, `results/<name>/<seed>`.
    record : dict
        A metrics.json, path.json or DONE.json; its `inputs` are looked up, and theirs in turn.
    """
    changed = set()
    for name, digest in (record.get("inputs") or {}).items():
        file = folder / name
        if name.startswith("..") or file.name != "DONE.json" or not file.is_file():
            continue
        if sha256_file(file) != digest:
            changed.add(name)
        else:
            changed |= set(changed_inputs(folder, read_json(file)))
    return sorted(changed)


def unequal_healing(folder: Path, first: str, second: str, whole: bool = True) -> list[str] | None:
    """What differs between the healings of two variants: steps, LoRA. None if one of them does not say.

    Arguments
    ---------
    folder : Path
        The experiment, `results/<name>/<seed>`.
    first, second : str
        Names of variants; a plain cut has no healing, and differs in nothing.
    whole : bool
        Whether everything else that decides a healing (its config hash) must be equal too.
    """
    if any(name.endswith("-none") for name in (first, second)):
        return []
    try:
        one, two = (read_json(folder / "heal" / name / "DONE.json") for name in (first, second))
    except UserError:
        return None
    keys = ["num_steps", "lora"] if "none" not in (one["heal_mode"], two["heal_mode"]) else []
    keys += ["config_hash"] if whole else []
    unequal = [(key, one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)]
    return [
        f"config hash {str(before)[:12]} and {str(now)[:12]}"
        if key == "config_hash"
        else f"{key} {before} and {now}"
        for key, before, now in unequal
    ]
