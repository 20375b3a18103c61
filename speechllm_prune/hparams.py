"""An experiment's YAML: a leaf and the command line laid over the base, checked, then loaded by stock HyperPyYAML.

The overlay is made on the text, node by node, because HyperPyYAML's own override would keep the class of a `!name:`
node whose class is to be replaced. The result is one flat file that stock `load_hyperpyyaml` loads without this module.
What a key may hold is in `keys.py`, what an object may be in `objects.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from speechllm_prune.experiment import sha256_file, sha256_json
from speechllm_prune.keys import COMMAND_LINE, EXTENSION_POINTS, check_known, checked
from speechllm_prune.objects import ALLOWED_MODULES, check_kind, check_objects
from speechllm_prune.runtime import UserError
from speechllm_prune.tasks import TASKS
from speechllm_prune.yaml_text import dump, line_of, nodes_of, parse, plain, read_tree, tag_of

SHIPPED_BASE = Path(__file__).resolve().parents[1] / "hparams" / "base" / "speechllm.yaml"

MACHINE_KEYS = frozenset(
    "data_folder results_folder manifest_folder device num_workers prepare skip_prep ckpt_interval_minutes "
    "nonfinite_patience ddp_timeout_minutes loss_chunk_rows gradient_checkpointing compile_layers decode_graphs".split()
)
"""Keys that say where and how fast, not what."""

SELECTION_KEYS = frozenset(
    "eval_manifests variant shuffle_audio block_size start_layer path heal_mode control tag block_sizes heal_modes "
    "plan shard measure_input tolerance results_note into task_name".split()
)
"""Keys that choose among results which have folders of their own, or how results are shown."""

STAGE_KEYS: dict[str, frozenset[str]] = {
    "measure": frozenset(
        "measure_manifest text_file last_token measure_lora measure_batch_size".split()
    ),
    "rerank": frozenset("rerank rerank_utterances".split()),
    "heal": frozenset(
        "heal_steps heal_lora_rank heal_lora_alpha heal_lora_dropout heal_lora_layers heal_kl_beta heal_kl_top "
        "compensate compensate_ridge compensate_utterances".split()
    ),
    "evaluate": frozenset(
        "eval_batch_size eval_batch_positions max_tokens_per_second target_language".split()
    ),
}
"""Keys that decide the results of one stage after training. Keys in none of these sets are the training's identity."""


def load_hparams(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load an experiment: base, leaf over it, overrides over both. Builds nothing heavy and touches no random state.

    Arguments
    ---------
    path : str or Path
        A leaf (with a `base` key), the base itself, or an archived `hyperparams.yaml`.
    overrides : mapping, optional
        Flat keys, as on the command line.

    Returns
    -------
    dict
        Every key of the base, with `!name:` nodes as callables.

    Raises
    ------
    UserError
        Unknown key, wrong type or value, an object from a module that is not allowed, a placeholder left.
    """
    return load_resolved(resolve_hparams(path, overrides), str(path))


def load_resolved(
    text: str, source: str = "the YAML", unused: Iterable[str] = ()
) -> dict[str, Any]:
    """Load the text that `resolve_hparams` made, with stock HyperPyYAML; placeholders of `unused` keys become ''."""
    import logging

    from hyperpyyaml import load_hyperpyyaml

    text = fill_placeholders(text, source, unused)
    # SpeechBrain's loggers warn while they are imported that torchvision is missing; only its image logger needs it.
    logging.disable(logging.WARNING)
    try:
        return load_hyperpyyaml(text)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, YAMLError) as error:
        raise UserError(f"{source}: {str(error).strip()}") from None
    finally:
        logging.disable(logging.NOTSET)


def fill_placeholders(text: str, source: str, unused: Iterable[str] = ()) -> str:
    """The text with '' for the placeholders of `unused` keys.

    Raises
    ------
    UserError
        If another one is left, saying where it is and how to set it.
    """
    tree = parse(text, source)
    missing = [key for key, node in tree.items() if tag_of(node) == "!PLACEHOLDER"]
    left = [key for key in missing if key not in unused]
    if left:
        places = ", ".join(f"'{key}' ({_place(source, key)})" for key in left)
        raise UserError(
            f"{source}: give {' and '.join(f'--{key} VALUE' for key in left)}, or a line `{left[0]}: VALUE` in the "
            f"YAML: {places} has no default"
        )
    return with_values(text, dict.fromkeys(missing, "")) if missing else text


def _place(source: str, key: str) -> str:
    """File and line where a key is set: in the leaf, else in its base."""
    path = Path(source)
    if not path.is_file():
        return source
    tree = read_tree(path)
    if key not in tree and "base" in tree:
        path = path.parent / str(tree["base"])
        tree = read_tree(path)
    return line_of(tree, key, path) if key in tree else source


def resolve_hparams(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    allowed_modules: Iterable[str] = (),
    archive: Path | None = None,
) -> str:
    """The flat YAML text of an experiment: base, leaf, archive and overrides in one, references kept.

    Everything in it has been checked; no object is built.

    Arguments
    ---------
    path, overrides
        See `load_hparams`.
    allowed_modules : iterable of str
        Further packages whose objects are allowed (`--allow_module`).
    archive : Path, optional
        The training stage's `hyperparams.yaml`, which wins over the leaf in everything but the machine's keys.
    """
    path, modules = Path(path), (*ALLOWED_MODULES, *allowed_modules)
    leaf = read_tree(path)
    root = _base_of(path, leaf)
    tree = leaf if root == path else read_tree(root)
    if root != path and "base" in tree:
        raise UserError(
            f"{line_of(tree, 'base', root)}: a base may not have a base of its own; copy that leaf and edit it"
        )
    defaults, places = _check_root(root, tree)
    if root != path:
        del leaf["base"]
        _overlay(leaf, path, tree, defaults, places)
        task = (overrides or {}).get("task", tree["task"])
        if "tolerance" not in leaf and task in TASKS:
            tree["tolerance"] = TASKS[task].tolerance
    if archive:
        old = read_tree(archive)
        kept = {
            key
            for key in old
            if key in tree and (key not in MACHINE_KEYS or tag_of(tree[key]) == "!PLACEHOLDER")
        }
        for key in [key for key in old if key not in kept]:
            del old[key]
        _overlay(old, archive, tree, defaults, places)
    for key, value in (overrides or {}).items():
        check_known(key, tree, COMMAND_LINE)
        tree[key] = checked(key, value, defaults[key], COMMAND_LINE)
        places[key] = COMMAND_LINE
    _check_references(tree, defaults, places)
    # What is as in the shipped base needs no import to be believed.
    trusted = defaults if SHIPPED_BASE.is_file() else {}
    for key, node in tree.items():
        if key not in trusted or plain(node) != plain(trusted[key]):
            check_objects(key, node, modules, places[key])
            if key in EXTENSION_POINTS:
                check_kind(key, node, modules, places[key])
    return dump(tree)


def _base_of(path: Path, leaf: CommentedMap) -> Path:
    """The base that a leaf names; the file itself if it has no `base`."""
    if "base" not in leaf:
        return path
    name, where = leaf["base"], line_of(leaf, "base", path)
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"{where}: 'base' takes a file, such as base/speechllm.yaml, given {plain(name)!r}"
        )
    base = path.parent / name
    if not base.is_file():
        raise UserError(f"{where}: base: {base} does not exist")
    return base


def _check_root(root: Path, tree: CommentedMap) -> tuple[dict[str, Any], dict[str, str]]:
    """Hold a file without a base to the shipped base; returns what its defaults are, and where its keys stand."""
    places = {key: line_of(tree, key, root) for key in tree}
    if not SHIPPED_BASE.is_file() or root.resolve() == SHIPPED_BASE:
        return dict(tree), places
    shipped = read_tree(SHIPPED_BASE)
    missing = [key for key in shipped if key not in tree]
    known = [key for key in tree if key in shipped]
    if missing and len(missing) > len(known):
        raise UserError(
            f"{root}, line 1: has no `base: base/speechllm.yaml` and lacks {len(missing)} keys, such as '{missing[0]}'"
        )
    for key in tree:
        check_known(key, shipped, places[key])
        tree[key] = checked(key, tree[key], shipped[key], places[key])
    if missing:
        raise UserError(
            f"{places[known[-1]]}: lacks {', '.join(missing)}, which {SHIPPED_BASE.name} has; copy the line from there"
        )
    return dict(shipped), places


def _overlay(
    upper: CommentedMap,
    path: Path,
    tree: CommentedMap,
    defaults: Mapping[str, Any],
    places: dict[str, str],
) -> None:
    """Lay one tree over another, each value checked against the base's."""
    for key, value in upper.items():
        where = line_of(upper, key, path)
        check_known(key, tree, where)
        tree[key] = checked(key, value, defaults[key], where)
        places[key] = where


def _check_references(
    tree: CommentedMap, defaults: Mapping[str, Any], places: Mapping[str, str]
) -> None:
    """Every `!ref` names a key, none refers to itself, and what it stands for is of the right type."""
    for key, node in tree.items():
        for part in nodes_of(node):
            if tag_of(part) in ("!ref", "!copy"):
                names = re.findall(r"<([^>]*)>", str(part.value))
                if not names:
                    raise UserError(
                        f"{places[key]}: '{key}': a reference is written !ref <key>, given !ref {part.value}"
                    )
                for name in names:
                    where = f"{places[key]}: '{key}': the reference <{name}>"
                    check_known(re.split(r"[\[.]", name)[0], tree, where)
    given = [
        key
        for key, node in tree.items()
        if tag_of(node) == "!ref" and plain(node) != plain(defaults[key])
    ]
    if not given:
        return
    try:
        values = plain_values(dump(tree))
    except (ValueError, KeyError, TypeError, RecursionError, YAMLError) as error:
        raise UserError(
            f"{places[given[0]]}: '{given[0]}': the reference cannot be resolved: {error}"
        ) from None
    for key in given:
        if str(values[key]).startswith("!ref "):
            raise UserError(f"{places[key]}: '{key}': the reference leads back to itself")
        checked(key, values[key], defaults[key], places[key])


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """The flat YAML text with plain values in the place of some of its own."""
    tree = parse(text, "the YAML")
    tree.update(values)
    return dump(tree)


def plain_values(text: str) -> dict[str, Any]:
    """The values that a flat YAML text stands for, references resolved, objects as in `identity`: nothing is built."""
    from hyperpyyaml import resolve_references

    tree = parse(text, "the YAML")
    for key in [key for key, node in tree.items() if tag_of(node) == "!PLACEHOLDER"]:
        tree[key] = ""
    return plain(parse(resolve_references(dump(tree)).getvalue(), "the YAML"))


def identity(text: str, source: str = "the YAML") -> dict[str, Any]:
    """What an experiment is, as a flat JSON mapping: every key that is not the machine's.

    Objects appear as their tag and arguments, so that another optimiser class is another identity.
    """
    return {
        key: plain(node) for key, node in parse(text, source).items() if key not in MACHINE_KEYS
    }


def is_training_key(key: str) -> bool:
    """Whether a key is part of what training made: data, model, optimisation."""
    return key not in MACHINE_KEYS | SELECTION_KEYS and not any(
        key in keys for keys in STAGE_KEYS.values()
    )


def stage_identity(values: Mapping[str, Any], *stages: str) -> dict[str, Any]:
    """The part of an identity that decides the results of training and of the given later stages."""
    wanted = frozenset().union(*(STAGE_KEYS[stage] for stage in stages)) if stages else frozenset()
    return {key: value for key, value in values.items() if is_training_key(key) or key in wanted}


def config_hash(values: Mapping[str, Any], *stages: str) -> str:
    """Hash of `stage_identity`, the two hubs entering by content (local folder) or id and revision."""
    part = stage_identity(values, *stages)
    for side in ("encoder", "decoder"):
        part[f"{side}_hub"] = hub_fingerprint(
            str(part[f"{side}_hub"]), part.pop(f"{side}_revision")
        )
    return sha256_json(part)


def differences(new: Mapping[str, Any], old: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """One line for every key whose values differ; two local hubs with the same files are the same hub."""
    lines = []
    for key in keys:
        a, b = new.get(key), old.get(key)
        same = a == b or (
            key.endswith("_hub") and hub_fingerprint(str(a), None) == hub_fingerprint(str(b), None)
        )
        if not same:
            lines.append(f"{key} is {a!r} here and {b!r} in the archive")
    return lines


def is_local_hub(hub: str) -> bool:
    """Whether a hub is a folder, there or not, and no hub id.

    Example
    -------
    >>> is_local_hub("results/stand_ins/demo/encoder"), is_local_hub("Qwen/Qwen2.5-7B")
    (True, False)
    """
    return Path(hub).is_dir() or hub.startswith((".", "/", "~")) or hub.count("/") > 1


def hub_commit(hub: str, revision: str | None) -> str | None:
    """The commit that a hub model in the local cache is of; None for a local folder, or what is not in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(hub, "config.json", revision=revision)
    except HFValidationError:  # a local folder
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def revision_notes(values: Mapping[str, Any]) -> list[str]:
    """One line for every hub model that is not pinned to a commit."""
    notes = []
    for side in ("encoder", "decoder"):
        hub, revision = values[f"{side}_hub"], values[f"{side}_revision"]
        if not is_local_hub(hub) and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            notes.append(
                f"{hub} is not pinned: revision {revision or 'main'} may change; --{side}_revision COMMIT pins it"
            )
    return notes


def hub_fingerprint(hub: str, revision: str | None) -> str:
    """Identity of a pretrained model: hash over the files of a local folder, or `id@revision` of a hub model."""
    folder = Path(hub)
    if not folder.is_dir():
        return f"{hub}@{revision or 'main'}"
    names = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in {".json", ".safetensors", ".txt", ".model", ".bin"})
    )
    return "sha256:" + sha256_json(
        {file.name: _cached_sha256(file) for file in names if file.name != "bootstrap.json"}
    )


_SHA256: dict[tuple[str, int, int], str] = {}


def _cached_sha256(file: Path) -> str:
    status = file.stat()
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _SHA256:
        _SHA256[key] = sha256_file(file)
    return _SHA256[key]
