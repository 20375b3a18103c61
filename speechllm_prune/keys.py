"""What the keys of an experiment may hold: type, range, closed sets. Messages name key, value and what is allowed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt

from speechllm_prune.experiment import HEAL_MODES, Variant
from speechllm_prune.runtime import UserError
from speechllm_prune.yaml_text import plain, tag_of

EXTENSION_POINTS = frozenset(
    "opt_class lr_scheduler projector_class activation train_logger".split()
)
"""Object nodes that a leaf may replace."""

CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("asr", "ast"),
    "text_case": ("lower", "upper", "keep"),
    "encoder_output_norm": ("none", "layer"),
    "attention": ("sdpa", "eager"),
    "precision": ("auto", "fp32", "bf16"),
    "measure_input": ("speech", "text"),
    "last_token": ("sequence", "prompt"),
    "heal_mode": HEAL_MODES,
    "heal_lora_layers": ("receiver", "all"),
    "plan": ("all", "coarse"),
    "decode_graphs": ("never", "auto", "always"),
}
COMMAND_LINE = "command line"
POSITIVE = frozenset(
    "frame_stack projector_dim num_steps batch_size pool_batches grad_accumulation_factor valid_interval heal_steps "
    "heal_lora_rank heal_lora_alpha decoder_lora_alpha eval_batch_size measure_batch_size rerank_utterances "
    "heal_kl_top compensate_utterances lr max_grad_norm max_tokens_per_second nonfinite_patience "
    "ddp_timeout_minutes".split()
)
NOT_NEGATIVE = frozenset(
    "warmup_steps batch_positions valid_utterances decoder_lora_rank min_seconds max_seconds max_target_tokens "
    "num_workers seed ckpt_interval_minutes block_size rerank heal_kl_beta compensate_ridge max_bad_share tolerance "
    "loss_chunk_rows eval_batch_positions".split()
)
SHARES = frozenset(
    "final_lr_share warmdown_share max_bad_share decoder_lora_dropout heal_lora_dropout".split()
)
NOT_EMPTY = frozenset(
    "data_folder results_folder manifest_folder prepare valid_manifest measure_manifest encoder_hub "
    "decoder_hub".split()
)
MANIFEST_KEYS = ("train_manifests", "valid_manifest", "measure_manifest", "eval_manifests")
NAMED_PATHS = ("own", "text", "tail", "influence", "random", "rerank")
"""What `path` takes beside a file: which selector chooses, and on what."""


def manifests_of(values: Mapping[str, Any]) -> list[str]:
    """Every manifest that an experiment names."""
    single = [values["valid_manifest"], values["measure_manifest"]]
    return [*values["train_manifests"], *single, *values["eval_manifests"]]


def check_known(key: Any, keys: Iterable[str], where: str) -> None:
    """Refuse a key that is not there, naming the nearest one."""
    keys = list(keys)
    if key not in keys:
        near = difflib.get_close_matches(str(key), keys, 1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{where}: unknown key '{key}'{hint}")


def checked(key: str, value: Any, default: Any, where: str) -> Any:
    """The value in the type of the base's default.

    Arguments
    ---------
    key : str
        Key of the YAML.
    value : Any
        Its value in the tree, or from the command line.
    default : Any
        Value in the base.
    where : str
        File and line, or `command line`.

    Raises
    ------
    UserError
        Naming key, value and what is allowed.
    """
    tag = tag_of(value)
    if key in EXTENSION_POINTS:
        if tag is None or not tag.startswith("!name:"):
            raise UserError(
                f"{where}: '{key}' takes an object such as !name:package.Class, given {tag or repr(value)}"
            )
        return value
    if tag is not None and where == COMMAND_LINE:
        raise UserError(f"{where}: '{key}': tags are not allowed in values, given {value!r}")
    if tag in ("!ref", "!PLACEHOLDER"):
        return value
    if tag is not None:
        raise UserError(
            f"{where}: '{key}' is not an extension point and takes a plain value, given {tag}"
        )
    # A folder that has no default, or is made from another one, is text.
    default = "" if tag_of(default) in ("!ref", "!PLACEHOLDER") else plain(default)
    value = _typed(key, value, default, where)
    _check_range(key, value, where)
    _check_form(key, value, where)
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
        if all(_is_text(item) for item in items):
            return [str(item) for item in items]
    if kind is str and _is_text(value):
        if re.fullmatch(r"\(.*\)", str(value)):
            raise UserError(
                f"{where}: '{key}' takes text, and text in round brackets is read as a tuple, given {value!r}"
            )
        return str(value)
    told = repr(plain(value))
    if kind is str and isinstance(value, (ScalarFloat, ScalarInt)):
        told += "; a number that is meant as text needs quotes"
    raise UserError(f"{where}: '{key}' takes {wanted[kind]}, given {told}")


def _is_text(value: Any) -> bool:
    """Text, or a number that reads back as it was written (not 007, 1_000 or 1.50 in a file)."""
    if isinstance(value, (bool, ScalarFloat, ScalarInt)):
        return False
    return isinstance(value, (str, int, float))


def _check_range(key: str, value: Any, where: str) -> None:
    allowed = ""
    if isinstance(value, float) and not math.isfinite(value):
        allowed = "a finite number"
    elif key in POSITIVE and value <= 0:
        allowed = "above 0"
    elif key in NOT_NEGATIVE and value < 0:
        allowed = "0 or more"
    elif key in SHARES and not 0 <= value <= 1:
        allowed = "from 0 to 1"
    elif key == "start_layer" and value < -1:
        allowed = "-1 (as the path says) or more"
    elif key in NOT_EMPTY and not value.strip():
        allowed = "named, not empty"
    if allowed:
        raise UserError(f"{where}: '{key}' must be {allowed}, given {value!r}")


def _check_form(key: str, value: Any, where: str) -> None:
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{where}: '{key}' is one of {', '.join(CHOICES[key])}, given {value!r}")
    try:
        if key in MANIFEST_KEYS:
            for name in [value] if isinstance(value, str) else value:
                _check_manifest(name)
        elif key in _FORMS:
            _FORMS[key](value)
    except UserError as error:
        named = "" if str(error).startswith(key) else f"'{key}': "
        raise UserError(f"{where}: {named}{error}") from None


def _check_manifest(name: str) -> None:
    parts = name.split("/")
    if len(parts) != 2 or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"'{name}' is no manifest key; write <corpus>/<split>, such as librispeech/test-clean"
        )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(
            f"experiment_name {name!r} becomes a folder's name: use letters, digits, '_', '.', '+' and '-'"
        )


def _check_shard(text: str) -> None:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[2]) < 1 or int(match[1]) > int(match[2]):
        raise UserError(f"shard {text!r} is not i/N, such as 1/4 ... 4/4")


def _check_modes(modes: list[str]) -> None:
    for text in modes:
        if text.split("+")[0] not in CHOICES["heal_mode"]:
            raise UserError(f"heal_modes: {text!r} is not one of {', '.join(CHOICES['heal_mode'])}")


def _check_path(text: str) -> None:
    for path in map(str.strip, text.split(",")):
        # A file may be measured later; a bare word is a name.
        is_file = path.endswith(".json") or "/" in path or Path(path).is_file()
        if path not in NAMED_PATHS and not is_file:
            raise UserError(f"path {path!r} is neither {', '.join(NAMED_PATHS)} nor a file")


def _check_device(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise UserError(f"device {name!r} is none; give cpu, cuda or cuda:N")


_FORMS: dict[str, Callable[[Any], Any]] = {
    "experiment_name": _check_name,
    "shard": _check_shard,
    "heal_modes": _check_modes,
    "path": _check_path,
    "device": _check_device,
    "variant": Variant.parse,
    "tag": lambda text: Variant(tag=text),
}


def check_together(values: Mapping[str, Any], source: str) -> None:
    """Refuse values that cannot go together, each of them fine alone.

    Raises
    ------
    UserError
    """
    shortest, longest = values["min_seconds"], values["max_seconds"]
    if 0 < longest < shortest:
        raise UserError(
            f"{source}: 'min_seconds' {shortest:g} is above 'max_seconds' {longest:g}: no utterance would be left"
        )
    for key in ("measure_manifest", "valid_manifest"):
        if values[key] in values["train_manifests"]:
            raise UserError(
                f"{source}: '{key}' is {values[key]}, which is also in 'train_manifests'; name a development split"
            )
