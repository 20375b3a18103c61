"""An experiment's YAML: a leaf and the command line laid over the base, checked, then loaded by stock HyperPyYAML.

The overlay is made on the text, node by node, because HyperPyYAML's own override would keep the class of a `!name:`
node whose class is to be replaced. The result is one flat file that stock `load_hyperpyyaml` loads without this module.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from ruamel.yaml.error import YAMLError

from speechllm_prune.experiment import Variant, sha256_file, sha256_json
from speechllm_prune.runtime import UserError

MACHINE_KEYS = frozenset(
    "data_folder results_folder manifest_folder device num_workers prepare skip_prep ckpt_interval_minutes".split()
)
"""Keys that say where and how fast, not what."""

SELECTION_KEYS = frozenset(
    "eval_manifests variant shuffle_audio block_size start_layer path heal_mode control tag block_sizes heal_modes "
    "shard measure_input tolerance results_note into task_name".split()
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
    "evaluate": frozenset("eval_batch_size max_tokens_per_second target_language".split()),
}
"""Keys that decide the results of one stage after training. Keys in none of these sets are the training's identity."""

EXTENSION_POINTS = frozenset(
    "opt_class lr_scheduler projector_class activation train_logger".split()
)
"""Object nodes that a leaf may replace."""

ALLOWED_MODULES = (
    "speechllm_prune",
    "recipes",
    "speechbrain",
    "torch",
    "torchaudio",
    "transformers",
    "peft",
)
"""Packages that a YAML may take objects from."""

CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("asr", "ast"),
    "text_case": ("lower", "upper", "keep"),
    "encoder_output_norm": ("none", "layer"),
    "attention": ("sdpa", "eager"),
    "precision": ("auto", "fp32", "bf16"),
    "measure_input": ("speech", "text"),
    "last_token": ("sequence", "prompt"),
    "heal_mode": ("none", "decoder", "projector", "joint"),
    "heal_lora_layers": ("receiver", "all"),
}
COMMAND_LINE = "command line"
POSITIVE = frozenset(
    "frame_stack projector_dim num_steps batch_size pool_batches grad_accumulation_factor valid_interval heal_steps "
    "heal_lora_rank eval_batch_size measure_batch_size rerank_utterances heal_kl_top compensate_utterances lr "
    "max_grad_norm max_tokens_per_second".split()
)
NOT_NEGATIVE = frozenset(
    "warmup_steps batch_positions valid_utterances decoder_lora_rank min_seconds max_seconds max_target_tokens "
    "num_workers block_size rerank heal_kl_beta compensate_ridge max_bad_share tolerance".split()
)


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

    tree = _parse(text, source)
    missing = [key for key, node in tree.items() if _tag(node) == "!PLACEHOLDER"]
    idle = [key for key in missing if key in unused]
    if idle:
        text = with_values(text, dict.fromkeys(idle, ""))
        missing = [key for key in missing if key not in idle]
    if missing:
        raise UserError(
            f"{source}: give {' and '.join(f'--{key} VALUE' for key in missing)} (no default is possible)"
        )
    # SpeechBrain's loggers warn while they are imported that torchvision is missing; only its image logger needs it.
    logging.disable(logging.WARNING)
    try:
        return load_hyperpyyaml(text)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"{source}: {str(error).strip()}") from None
    finally:
        logging.disable(logging.NOTSET)


def resolve_hparams(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    allowed_modules: Iterable[str] = (),
    archive: Path | None = None,
) -> str:
    """The flat YAML text of an experiment: base, leaf, archive and overrides in one, references kept.

    Arguments
    ---------
    path, overrides
        See `load_hparams`.
    allowed_modules : iterable of str
        Further packages whose objects are allowed (`--allow_module`).
    archive : Path, optional
        The training stage's `hyperparams.yaml`, which wins over the leaf in everything but the machine's keys.
    """
    path = Path(path)
    leaf = _read(path)
    tree = leaf
    if "base" in leaf:
        base_path = path.parent / str(leaf.pop("base"))
        tree = _read(base_path)
        if "base" in tree:
            raise UserError(f"{base_path}: a base may not have a base of its own")
        for key, value in leaf.items():
            where = f"{path}, line {leaf.lc.key(key)[0] + 1}"
            _check_known(key, tree, where)
            tree[key] = _checked(key, value, tree[key], where)
    for key, value in (_read(archive) if archive else {}).items():
        if key in tree and (key not in MACHINE_KEYS or _tag(tree[key]) == "!PLACEHOLDER"):
            tree[key] = value
    for key, value in (overrides or {}).items():
        _check_known(key, tree, COMMAND_LINE)
        tree[key] = _checked(key, value, tree[key], COMMAND_LINE)
    modules = (*ALLOWED_MODULES, *allowed_modules)
    for key, node in tree.items():
        _check_objects(key, node, modules, path)
    return _dump(tree)


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """The flat YAML text with plain values in the place of some of its own."""
    tree = _parse(text, "the YAML")
    tree.update(values)
    return _dump(tree)


def identity(text: str) -> dict[str, Any]:
    """What an experiment is, as a flat JSON mapping: every key that is not the machine's.

    Objects appear as their tag and arguments, so that another optimiser class is another identity.
    """
    return {
        key: _plain(node)
        for key, node in _parse(text, "the YAML").items()
        if key not in MACHINE_KEYS
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


# ---------------------------------------------------------------- parsing and checking


def _yaml() -> YAML:
    yaml = YAML()  # round trip: keeps tags, comments and order, and constructs no object
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml


def _dump(tree: CommentedMap) -> str:
    stream = io.StringIO()
    _yaml().dump(tree, stream)
    return stream.getvalue()


def _parse(text: str, source: str) -> CommentedMap:
    try:
        tree = _yaml().load(text)
    except YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{source}: a mapping of keys to values is expected")
    return tree


def _read(path: Path) -> CommentedMap:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        folder = path.parent
        near = (
            difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], 1)
            if folder.is_dir()
            else []
        )
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise UserError(f"{path} does not exist{hint}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path} is not a YAML file") from None


def _tag(node: Any) -> str | None:
    value = getattr(getattr(node, "tag", None), "value", None)
    return str(value) if value is not None and not str(value).startswith("tag:yaml.org") else None


def _plain(node: Any) -> Any:
    tag = _tag(node)
    if isinstance(node, TaggedScalar):
        return f"{tag} {node.value}".strip()
    if isinstance(node, Mapping):
        value: Any = {str(key): _plain(item) for key, item in node.items()}
        return {"tag": tag, **value} if tag else value
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float):  # ruamel's own scalar classes are no JSON
        if isinstance(node, kind):
            return kind(node)
    return str(node)


def _check_known(key: str, tree: CommentedMap, where: str) -> None:
    if key not in tree:
        near = difflib.get_close_matches(key, list(tree), 1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{where}: unknown key '{key}'{hint}")


def _checked(key: str, value: Any, default: Any, where: str) -> Any:
    """The value in the type of the base's default, or an error that names key, value and what is allowed."""
    default_tag, value_tag = _tag(default), _tag(value)
    if key in EXTENSION_POINTS:
        if value_tag is None or not value_tag.startswith(("!name:", "!new:")):
            raise UserError(
                f"{where}: '{key}' takes an object such as !name:package.Class, given {value!r}"
            )
        return value
    if value_tag is not None and where == COMMAND_LINE:
        raise UserError(f"{where}: '{key}': tags are not allowed in values, given {value!r}")
    if value_tag == "!ref" or default_tag in ("!PLACEHOLDER", "!ref"):
        return value if value_tag else str(value)
    if value_tag is not None:
        raise UserError(
            f"{where}: '{key}' is not an extension point and takes a plain value, given {value_tag}"
        )
    value = _typed(key, value, _plain(default), where)
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{where}: '{key}' is one of {', '.join(CHOICES[key])}, given {value!r}")
    if key == "tag":
        Variant(tag=value)  # refuses what cannot be part of a folder's name
    if (key in POSITIVE and value <= 0) or (key in NOT_NEGATIVE and value < 0):
        raise UserError(
            f"{where}: '{key}' must be {'above 0' if key in POSITIVE else '0 or more'}, given {value!r}"
        )
    return value


def _typed(key: str, value: Any, default: Any, where: str) -> Any:
    wanted = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        list: "a list, such as a,b",
        str: "text",
    }
    kind = str if default is None else type(default)
    if default is None and value is None:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is list and not isinstance(value, Mapping):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        items = list(value) if isinstance(value, list) else [value]
        if key == "block_sizes":
            if not all(str(item).isdigit() and int(item) > 0 for item in items):
                raise UserError(
                    f"{where}: 'block_sizes' takes whole numbers above 0, given {value!r}"
                )
            return [int(item) for item in items]
        return [str(item) for item in items]
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: '{key}' takes {wanted[kind]}, given {value!r}")


def _check_objects(key: str, node: Any, modules: tuple[str, ...], path: Path) -> None:
    tag = _tag(node)
    if tag and tag.startswith(("!new:", "!name:", "!apply:", "!module:")):
        name = tag.split(":", 1)[1]
        if name.split(".")[0] not in modules:
            raise UserError(
                f"{path}: '{key}' takes an object from {name!r}; a YAML is code, so only these packages are allowed: "
                f"{', '.join(modules)}. --allow_module {name.split('.')[0]} allows it for this run"
            )
    elif tag and tag not in ("!ref", "!copy", "!tuple", "!PLACEHOLDER"):
        raise UserError(f"{path}: '{key}': the tag {tag} is not allowed")
    if isinstance(node, Mapping):
        for item in node.values():
            _check_objects(key, item, modules, path)
    elif isinstance(node, list):
        for item in node:
            _check_objects(key, item, modules, path)
