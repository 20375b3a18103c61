"""What `--help` of a verb says about its own keys: read from the base YAML, where they are explained."""

from __future__ import annotations

import re
from pathlib import Path

BASE = Path(__file__).resolve().parents[1] / "hparams" / "base" / "speechllm.yaml"
OWN_KEYS = {
    "train": "data_folder experiment_name seed num_steps lr batch_size grad_accumulation_factor cache_features",
    "measure": "measure_input text_file last_token measure_lora rerank",
    "prune": "block_size start_layer path",
    "heal": "block_size start_layer path heal_mode heal_steps heal_lora_layers heal_kl_beta compensate control tag "
    "into task_name",
    "evaluate": "variant eval_batch_size max_tokens_per_second shuffle_audio",
    "sweep": "block_sizes heal_modes path plan control shard",
}
"""Keys that are given to a verb most often; every other key of the base is an option of every verb as well."""


def own_keys(verb: str) -> str:
    """A line for each of a verb's own keys: its default and its comment in the base YAML.

    Example
    -------
    >>> print(own_keys("prune"))
    keys of this verb, with the values of the base:
      --block_size 0    number of layers to remove
      --start_layer -1  first layer to remove; -1 = as the path says
      --path own        ...
    """
    options = []
    text = BASE.read_text(encoding="utf-8") if BASE.is_file() else ""
    for key in OWN_KEYS[verb].split() if text else ():
        found = re.search(rf"^{key}: (.*?)(?:\s+# (.*))?$", text, re.MULTILINE)
        assert found is not None, key
        value = {"!PLACEHOLDER": "FOLDER"}.get(found[1], found[1])
        options.append((f"--{key} {value}", found[2] or ""))
    width = max((len(option) for option, _ in options), default=0)
    lines = [f"  {option:<{width}}  {comment}".rstrip() for option, comment in options]
    return "\n".join(["keys of this verb, with the values of the base:", *lines])


def all_keys(verb: str) -> str:
    """The last line of `--help`."""
    return (
        "Every key of hparams/base/speechllm.yaml, which explains them, is an option (--key value, whole names only);\n"
        f"python {verb}.py LEAF --print_hparams shows all values of an experiment."
    )
