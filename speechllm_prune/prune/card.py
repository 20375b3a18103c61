"""What an export says of itself: the model card, the cut as mergekit writes it, and the memory of several tasks.

Everything is generated from speechllm.json; nothing is typed in. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MISSING = "not measured"
PIPELINE_TAGS = {"asr": "automatic-speech-recognition", "ast": "translation"}
SHARED_FIELDS = (
    "encoder encoder_output_norm frame_stack max_tokens_per_second projector variant parts results merge"
).split()
"""Fields of a task that an export of one task holds beside its list of tasks."""


def kept_ranges(kept_layers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring layers, half open.

    Example
    -------
    >>> kept_ranges([0, 1, 5, 6, 7])
    [(0, 2), (5, 8)]
    """
    runs: list[tuple[int, int]] = []
    for _, group in itertools.groupby(enumerate(kept_layers), key=lambda pair: pair[1] - pair[0]):
        layers = [layer for _, layer in group]
        runs.append((layers[0], layers[-1] + 1))
    return runs


def mergekit_yaml(
    hub: str, revision: str | None, fingerprint: str, kept_layers: Sequence[int], dtype: str
) -> str:
    """The cut as a mergekit configuration: half-open ranges, no empty one. For interchange; never used here.

    Arguments
    ---------
    hub : str
        Source of the decoder: a hub id, or a local folder, of which only the last name is given away.
    revision : str, optional
        Of the hub.
    fingerprint : str
        Of the source's files.
    kept_layers : sequence of int
        In the numbering of the source.
    dtype : str
        Of the weights.

    Example
    -------
    >>> print(mergekit_yaml("Qwen/Qwen2.5-7B", None, "Qwen/Qwen2.5-7B@main", [0, 1, 5], "bfloat16"), end="")
    # The cut of Qwen/Qwen2.5-7B@main for mergekit: ranges are half open. Healing is not part of it.
    merge_method: passthrough
    dtype: bfloat16
    slices:
      - sources:
          - model: Qwen/Qwen2.5-7B
            layer_range: [0, 2]
      - sources:
          - model: Qwen/Qwen2.5-7B
            layer_range: [5, 6]
    """
    name = public_name(hub) + (f"@{revision}" if revision else "")
    lines = [
        f"# The cut of {fingerprint} for mergekit: ranges are half open. Healing is not part of it.",
        "merge_method: passthrough",
        f"dtype: {dtype}",
        "slices:",
    ]
    for first, end in kept_ranges(kept_layers):
        lines += [
            "  - sources:",
            f"      - model: {name}",
            f"        layer_range: [{first}, {end}]",
        ]
    return "\n".join(lines) + "\n"


def human_bytes(count: int) -> str:
    """Bytes for reading, in powers of 1000.

    Example
    -------
    >>> human_bytes(15_231_000_000), human_bytes(512)
    ('15.23 GB', '512 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def public_name(hub: str) -> str:
    """A hub id as it is; of a local folder its last name: the rest means nothing elsewhere.

    Example
    -------
    >>> public_name("Qwen/Qwen2.5-7B"), public_name("./results/stand_ins/demo/decoder")
    ('Qwen/Qwen2.5-7B', 'decoder')
    """
    is_local = Path(hub).is_dir() or hub.startswith((".", "/", "~")) or hub.count("/") > 1
    return Path(hub).name if is_local else hub


# ------------------------------------------------------------------------------------------ several tasks


def task_entries(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks of a speechllm.json, each with all that it needs: one of a single task shares the fields above it."""
    shared = {name: card[name] for name in SHARED_FIELDS if name in card}
    return [shared | {"folder": None, "adapter": False} | task for task in card["tasks"]]


def memory_of_tasks(card: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and bytes of the weights: all tasks on one decoder, and a model of its own for each task.

    An encoder that tasks share is counted once on the one side, and once per task on the other.
    """
    entries = task_entries(card)
    together, separate = dict(card["decoder"]), {"parameters": 0, "bytes": 0}
    encoders = set()
    for entry in entries:
        parts = entry["parts"]
        encoder = (entry["encoder"]["fingerprint"], entry["encoder_output_norm"])
        for unit in ("parameters", "bytes"):
            together[unit] += parts["projector"][unit] + parts["adapter"][unit]
            together[unit] += parts["encoder"][unit] if encoder not in encoders else 0
            separate[unit] += (
                card["decoder"][unit] + parts["encoder"][unit] + parts["projector"][unit]
            )
        encoders.add(encoder)
    return {
        "tasks": len(entries),
        "together": {unit: together[unit] for unit in ("parameters", "bytes")},
        "separate": separate,
    }


def memory_line(card: Mapping[str, Any]) -> str:
    """`memory_of_tasks` in a sentence."""
    memory = memory_of_tasks(card)
    count, together, separate = memory["tasks"], memory["together"], memory["separate"]
    share = 100 * together["bytes"] / separate["bytes"]
    tasks, models = ("tasks", "models") if count > 1 else ("task", "model")
    return (
        f"{count} {tasks} on one decoder: {together['parameters']:,} parameters, {human_bytes(together['bytes'])} "
        f"({share:.1f} %); {count} separate {models}: {separate['parameters']:,} parameters, "
        f"{human_bytes(separate['bytes'])}"
    )


# ------------------------------------------------------------------------------------------ the model card


def model_card(card: Mapping[str, Any]) -> str:
    """README.md of an export, from its speechllm.json."""
    entries = task_entries(card)
    several = card.get("adapters") == "separate"
    kept, depth = card["kept_layers"], card["num_layers"]
    removed = [layer for layer in range(depth) if layer not in kept]
    hub, fingerprint = card["decoder_hub"], card["decoder_fingerprint"]
    front = ["---", "library_name: transformers"]
    if not fingerprint.startswith("sha256:"):  # a local folder has no page to link to
        front.append(f"base_model: {hub}")
    if len(entries) == 1:
        front.append(f"pipeline_tag: {PIPELINE_TAGS[entries[0].get('task', entries[0]['name'])]}")
    front += ["tags: [speechllm-prune, speech, layer-pruning]", "---"]
    what = (
        f"{len(kept)} of {depth} decoder layers (removed: {removed[0]} to {removed[-1]})"
        if removed
        else f"all {depth} decoder layers"
    )
    lines = [*front, "", f"# SpeechLLM with {what}", ""]
    for note in dict.fromkeys(filter(None, [card.get("note"), *(e.get("note") for e in entries)])):
        lines += [f"> **Note:** {note}", ""]
    lines += [
        "Frozen speech encoder, MLP projector and pruned LLM decoder, written by speechllm-prune "
        f"{card['package_version']} (commit {card['git_commit']}).",
        "",
        "| | |",
        "|---|---|",
        f"| decoder | {hub}, revision {card['decoder_revision'] or 'main'} |",
        f"| its fingerprint | {fingerprint} |",
        f"| kept layers | {' '.join(map(str, kept))} (mergekit.yml has them as ranges) |",
        f"| weights | {card['decoder']['dtype']}, {card['decoder']['parameters']:,} parameters |",
        "",
        *_usage(entries, several),
    ]
    for entry in entries:
        lines += ["", *_task_section(entry, card)]
    if several:
        lines += ["", "## Memory", "", memory_line(card) + "."]
    lines += ["", "The licences of the decoder and of the encoders go on applying to this model."]
    return "\n".join(lines) + "\n"


def _usage(entries: Sequence[Mapping[str, Any]], several: bool) -> list[str]:
    task = f', task="{entries[-1]["name"]}"' if several else ""
    option = f" --task {entries[-1]['name']}" if several else ""
    lines = ["## Use", "", "```python", "from speechllm_prune import SpeechLLM"]
    lines += [f'SpeechLLM.from_pretrained("FOLDER").transcribe(["recording.flac"]{task})', "```"]
    lines += ["```bash", f"python transcribe.py FOLDER recording.flac{option}", "```"]
    if several:
        lines.append(
            "The decoder in this folder is pruned and not healed: plain `AutoModelForCausalLM.from_pretrained` loads "
            "it, and plain peft puts `adapters/<task>` on it."
        )
    else:
        lines.append(
            "The decoder alone is a plain causal LM: `AutoModelForCausalLM.from_pretrained` loads it."
        )
    return lines


def _task_section(entry: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    encoder = entry["encoder"]
    source = encoder["hub"] or f"in `{encoder['folder']}/`"
    lines = [f"## {entry['name']}: {entry['variant']}", "", "| | |", "|---|---|"]
    lines += [
        f"| prompt | {entry['prompt']} |",
        f"| encoder | {source}, {encoder['revision'] or encoder['fingerprint']} |",
        f"| frame_stack | {entry['frame_stack']} |",
        f"| text_case | {entry['text_case']} |",
        "",
        _merge_sentence(entry["merge"], card.get("adapters") == "separate"),
        "",
        "| evaluation set | metric | unpruned % | this model % | change | utterances | precision |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_result_row(result) for result in entry["results"]]
    if not entry["results"]:
        lines.append(f"| {MISSING} | | | | | | |")
    lines += ["", "Change: relative to the unpruned model, positive is worse."]
    return lines


def _merge_sentence(merge: Mapping[str, Any] | None, separate: bool) -> str:
    if merge is None:
        return "No adapter: the decoder's weights are those of its source."
    numbers = (
        f"(largest change of a logit by merging: {merge['max_logit_difference']:.2g}, largest logit "
        f"{merge['max_logit']:.3g}, same best token at {100 * merge['same_best_token']:.1f} % of "
        f"{merge['positions']} probe positions, {merge['dtype']})"
    )
    if separate:
        return (
            f"The adapter is kept apart, in fp32; the scores are of the merged decoder {numbers}."
        )
    return f"Adapters were merged in fp32 and rounded once; the scores are of the merged weights {numbers}."


def _result_row(result: Mapping[str, Any]) -> str:
    def number(value: float | None) -> str:
        return MISSING if value is None else f"{value:.2f}"

    change = result["relative_degradation"]
    cells = [
        result["eval_set"],
        (result["metric"] or "").upper(),
        number(result["full_value"]),
        number(result["value"]),
        MISSING if change is None else f"{100 * change:+.1f} %",
        str(result["num_utterances"] or MISSING),
        result["precision"] or MISSING,
    ]
    return "| " + " | ".join(cells) + " |"
