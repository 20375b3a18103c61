"""The command line of the verbs: `VERB LEAF [--key value ...]`, and what a run is once it has been read.

Our own argparse and not SpeechBrain's, which eats a '=' inside a value and accepts prefixes of names.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from speechllm_prune.experiment import Experiment, read_json
from speechllm_prune.hparams import (
    config_hash,
    differences,
    fill_placeholders,
    identity,
    is_training_key,
    load_resolved,
    plain_values,
    resolve_hparams,
    revision_notes,
    stage_identity,
)
from speechllm_prune.keys import check_together
from speechllm_prune.objects import find_callable
from speechllm_prune.redaction import holds_secret
from speechllm_prune.runtime import UserError
from speechllm_prune.usage import all_keys, own_keys

RUN_OPTIONS: dict[str, type] = {
    "debug_batches": int,
    "debug_epochs": int,
    "noprogressbar": bool,
    "distributed_backend": str,
    "find_unused_parameters": bool,
    "ckpt_interval_steps": int,
    "compile": bool,
}
"""SpeechBrain run options that are passed on to Brain, beside `--debug` and the YAML's own keys."""

WHICH = ("experiment_name", "seed", "results_folder", "manifest_folder")
"""Keys of a command line that the commands it recommends need, too."""


@dataclass
class Run:
    """One command: its leaf, what it resolves to, and the experiment it works on.

    Arguments
    ---------
    leaf : str
        The YAML file given.
    hparams : dict
        Loaded values.
    text : str
        The flat YAML text that they were loaded from.
    values : dict
        `identity` of the text.
    experiment : Experiment
        Where results go.
    flags : Namespace
        overwrite, dry_run, export and the like.
    run_options : dict
        For Brain.
    """

    leaf: str
    hparams: dict[str, Any]
    text: str
    values: dict[str, Any]
    experiment: Experiment
    flags: argparse.Namespace
    run_options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    """Keys of the command line."""

    def config_hash(self, *stages: str) -> str:
        """Hash of the training's identity and the given stages' keys."""
        return config_hash(self.values, *stages)

    def command(self, verb: str, *options: str) -> str:
        """A command on this experiment, for messages: with what the command line said about which one it is."""
        said = [
            f"--{key} {shlex.quote(str(self.given[key]))}" for key in WHICH if key in self.given
        ]
        said += [f"--allow_module {module}" for module in self.flags.allow_module]
        return " ".join(["python", f"{verb}.py", shlex.quote(self.leaf), *said, *options])


def parse_arguments(
    verb: str, summary: str, argv: list[str], flags: Mapping[str, str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read `LEAF`, flags, and `--key value` pairs for keys of the YAML.

    Arguments
    ---------
    verb : str
        Name of the script.
    summary : str
        First lines of `--help`, with an example.
    argv : list of str
        The arguments.
    flags : mapping, optional
        Further switches of this verb with their help.

    Returns
    -------
    Namespace, dict
        The flags, and the other pairs as plain values.
    """
    parser = argparse.ArgumentParser(
        prog=f"{verb}.py",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"{own_keys(verb)}\n\n{all_keys(verb)}",
    )
    parser.add_argument("leaf", metavar="LEAF", help="experiment YAML, such as hparams/demo.yaml")
    switches = {
        "overwrite": "make the stage again, deleting what it holds",
        "check": "validate the YAML and the command line, look at the data folder, then stop",
        "dry_run": "say what would be done and with which data, then stop",
        "print_hparams": "print the resolved YAML, then stop",
        "debug": "a few steps only, in a folder of its own (<seed>-debug)",
        **(flags or {}),
    }
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(
        "--allow_module", action="append", default=[], help="allow YAML objects from this package"
    )
    if any(item in ("-h", "--help") for item in argv):
        parser.print_help()
        raise SystemExit(0)
    if any(map(holds_secret, argv)):
        raise UserError(
            "command line: an argument looks like an access token; command lines are seen and kept by others, so it "
            "belongs into the environment (HF_TOKEN) or into `hf auth login`"
        )
    known, rest = _split(argv, set(switches) | {"allow_module"})
    try:
        namespace = parser.parse_args(known)
    except SystemExit:
        raise UserError(f"usage: {verb}.py LEAF [--key value ...]; see {verb}.py --help") from None
    return namespace, rest


def _split(argv: list[str], known: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate our own flags from `--key value` / `--key=value` pairs."""
    ours: list[str] = []
    pairs: dict[str, Any] = {}
    index = 0
    while index < len(argv):
        item = argv[index]
        index += 1
        name, equals, value = item[2:].partition("=")
        if not item.startswith("--"):
            ours.append(item)
        elif name in known:
            ours.append(item)
            if name == "allow_module" and not equals and index < len(argv):
                ours.append(argv[index])
                index += 1
        elif equals:
            pairs[name] = _value(name, value)
        elif index < len(argv) and not argv[index].startswith("--"):
            pairs[name] = _value(name, argv[index])
            index += 1
        else:
            pairs[name] = True
    return ours, pairs


class _Number(float):
    """A number of the command line that remembers how it was written, in case its key takes text (`--tag 1.50`)."""

    written: str

    def __str__(self) -> str:
        return self.written


def _value(name: str, text: str) -> Any:
    """A command-line value as YAML reads it, without any tag; what is no YAML is text.

    Text that YAML would change stays text: `2026_11` and `007` are names, '' is empty and not null.
    """
    if text.lstrip().startswith("!"):
        raise UserError(f"command line: '{name}': tags are not allowed in values, given {text!r}")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text
    same = {
        int: str(value) == text.removeprefix("+"),
        list: text.lstrip().startswith("["),
        type(None): text in ("null", "~"),
    }
    if isinstance(value, float):
        number = _Number(value)
        number.written = text
        return number
    return value if same.get(type(value), type(value) is bool) else text


def open_run(
    verb: str, summary: str, argv: list[str], flags: Mapping[str, str] | None = None
) -> Run | None:
    """Read a command into a `Run`; None if it only asked for `--check` or `--print_hparams`.

    Everything is checked before an object is built or a model is loaded. `--check` builds none at all.
    Training is defined by leaf and command line. Every later verb lays the training stage's archive over the leaf; a
    command-line value that contradicts the archive is refused.
    """
    options, pairs = parse_arguments(verb, summary, argv, flags)
    run_options = _take_run_options(pairs)
    if options.debug:
        run_options["debug"] = True
    text = resolve_hparams(options.leaf, pairs, options.allow_module)
    values = plain_values(text)
    where = Experiment(
        values["results_folder"], values["experiment_name"], values["seed"], options.debug
    )
    archive = where.archive()
    # Training is the authority on itself once it is done: what only exports it needs no word on how it was made.
    later = verb != "train" or (
        getattr(options, "export", False) and where.is_done("train") and not options.overwrite
    )
    if archive.is_file() and where.holds_training():
        leaf_text = resolve_hparams(options.leaf, None, options.allow_module)
        archived = identity(archive.read_text(encoding="utf-8"), str(archive))
        _compare(
            later, where, identity(text), archived, pairs, identity(leaf_text), options.overwrite
        )
        if later:
            text = resolve_hparams(options.leaf, pairs, options.allow_module, archive=archive)
            values = plain_values(text)
    if options.print_hparams:
        print(text, end="")
        return None
    # Only training prepares a corpus; later verbs find the audio through the manifests.
    unused = ("data_folder",) if later else ()
    fill_placeholders(text, options.leaf, unused)
    check_together(values, options.leaf)
    if verb == "train":
        for note in revision_notes(values):
            print(f"warning: {note}", file=sys.stderr)
    if options.check or options.dry_run:
        _look_around(verb, values, options)
    if options.check:
        print(f"{options.leaf}: ok ({len(values)} keys)")
        return None
    hparams = load_resolved(text, options.leaf, unused)
    return Run(options.leaf, hparams, text, identity(text), where, options, run_options, pairs)


def _look_around(verb: str, values: dict[str, Any], options: argparse.Namespace) -> None:
    """Say what is there to work with: data and pinned models. What is still missing is a note, no error."""
    find_callable(values["prepare"], options.allow_module)
    from speechllm_prune.data.overview import data_notes

    for note in data_notes(values, preparing=verb == "train" and not values["skip_prep"]):
        print(f"note: {note}")


def _take_run_options(pairs: dict[str, Any]) -> dict[str, Any]:
    taken = {}
    for name, kind in RUN_OPTIONS.items():
        if name in pairs:
            value = pairs.pop(name)
            if not isinstance(value, kind):
                raise UserError(f"command line: --{name} takes {kind.__name__}, given {value!r}")
            taken[name] = value
    return taken


def _compare(
    later: bool,
    experiment: Experiment,
    new: dict[str, Any],
    archived: dict[str, Any],
    pairs: dict[str, Any],
    leaf: dict[str, Any],
    overwrite: bool,
) -> None:
    archive = experiment.archive()
    if not later:
        lines = differences(new, archived, stage_identity(new))
        if lines and not overwrite:
            raise UserError(
                f"{archive} was made with other values: {'; '.join(lines)}. Use --overwrite to train again, or another "
                f"--experiment_name"
            )
        return
    lines = differences(new, archived, [key for key in pairs if is_training_key(key)])
    if lines:
        raise UserError(
            f"{archive} is the authority on this experiment: {'; '.join(lines)}. Leave the option out, or train "
            f"another --experiment_name with it"
        )
    origin = experiment.stage("train") / "leaf.json"
    if origin.is_file():
        before = read_json(origin)["values"]
        # What the command line said at training is no change of the leaf, and the archive itself may be the leaf.
        edited = [key for key in leaf if leaf[key] != before.get(key)]
        changed = differences(leaf, archived, edited)
        if changed:
            print(
                f"warning: the leaf has changed since training ({'; '.join(changed)}); the archive is used",
                file=sys.stderr,
            )
