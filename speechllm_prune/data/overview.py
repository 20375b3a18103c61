"""What there is to work with, before anything is prepared: for `--check` and `--dry_run`. No torch here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechllm_prune.data.manifest import manifest_path, prepare_command
from speechllm_prune.hparams import is_local_hub
from speechllm_prune.keys import manifests_of
from speechllm_prune.runtime import UserError


def data_notes(values: Mapping[str, Any], preparing: bool) -> list[str]:
    """One line about each thing that is there or lacks.

    Arguments
    ---------
    values : mapping
        Plain values of the YAML.
    preparing : bool
        Whether this command prepares the training corpus; others only use what is prepared.

    Returns
    -------
    list of str
    """
    wanted = list(dict.fromkeys(manifests_of(values)))
    prepared = [key for key in wanted if _is_prepared(values["manifest_folder"], key)]
    notes = [f"prepared: {', '.join(prepared)}"] if prepared else []
    corpus = values["train_manifests"][0].split("/")[0] if values["train_manifests"] else ""
    if preparing:
        splits = [key.split("/")[1] for key in wanted if key.split("/")[0] == corpus]
        notes += _folder_notes(values, corpus, splits)
    missing: dict[str, list[str]] = {}
    for key in wanted:
        if key not in prepared and not (preparing and key.split("/")[0] == corpus):
            command = prepare_command(
                manifest_path(values["manifest_folder"], key), values["prepare"]
            )
            missing.setdefault(command, []).append(key)
    notes += [f"not prepared: {', '.join(keys)}; run: {run}" for run, keys in missing.items()]
    for side in ("encoder", "decoder"):
        hub = values[f"{side}_hub"]
        if is_local_hub(hub) and not Path(hub).is_dir():
            notes.append(f"{side}_hub: the folder {hub} does not exist")
    return notes


def _is_prepared(manifest_folder: str, key: str) -> bool:
    path = manifest_path(manifest_folder, key)
    return path.is_file() and path.with_suffix(".json").is_file()


def _folder_notes(values: Mapping[str, Any], corpus: str, splits: list[str]) -> list[str]:
    """What the corpus folder holds, if the module of `prepare` can tell (`splits_in`)."""
    folder = values["data_folder"]
    module = importlib.import_module(values["prepare"].rpartition(".")[0])
    if not hasattr(module, "splits_in"):
        return [f"data_folder {folder}" + ("" if Path(folder).is_dir() else " does not exist")]
    try:
        found = module.splits_in(folder, Path(values["manifest_folder"]) / corpus)
    except UserError as error:
        return [f"data_folder: {error}"]
    notes = [f"data_folder {folder}: splits {', '.join(found)}"]
    missing = [split for split in splits if split not in found]
    if missing:
        notes.append(f"data_folder {folder} lacks {', '.join(missing)} of {corpus}")
    return notes
