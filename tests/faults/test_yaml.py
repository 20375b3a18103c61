"""Rows 51 to 54: a YAML with a mistake is refused with its file, line and key, before anything is built or written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from speechllm_prune.keys import (
    CHOICES,
    EXTENSION_POINTS,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARES,
)
from tests.conftest import REPO_ROOT
from tests.faults.processes import Processes
from tests.recipes.verbs import BASE, good, refused, run

VERBS = ("train", "measure", "prune", "heal", "evaluate", "sweep")
TREE = YAML().load(BASE.read_text(encoding="utf-8"))
KEYS = list(TREE)
HEAD = [f"base: {BASE}", "data_folder: corpus", "results_folder: results"]
FIRST = len(HEAD) + 1
"""Line of what a test adds."""

Write = Any


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a leaf; the text given stands from line FIRST on."""

    def write(text: str, head: list[str] = HEAD) -> Path:
        path = tmp_path / "leaf.yaml"
        path.write_text("\n".join([*head, text]) + "\n", encoding="utf-8")
        return path

    return write


# Each: what is written, the line that must be named (counted from its first), and words of the message.
MUTATIONS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "renamed": ("lrr: 1", 0, ("unknown key 'lrr'", "did you mean 'lr'")),
    "renamed long": ("heal_lora_rnak: 4", 0, ("'heal_lora_rnak'", "'heal_lora_rank'")),
    "case": ("Batch_Size: 4", 0, ("unknown key 'Batch_Size'", "'batch_size'")),
    "Brain's own name": ("number_of_epochs: 4", 0, ("unknown key 'number_of_epochs'",)),
    "number as key": ("1: 2", 0, ("unknown key '1'",)),
    "null as key": ("null: 2", 0, ("unknown key 'None'",)),
    "list as key": ("? [a, b]\n: 3", 0, ("unknown key",)),
    "hidden key": ("__x: 2", 0, ("unknown key '__x'",)),
    "text for number": ("\nlr: fast", 1, ("'lr' takes a number", "'fast'")),
    "number as text": ("lr: '1e-4'", 0, ("'lr' takes a number", "'1e-4'")),
    "decimals for whole": ("batch_size: 2.5", 0, ("'batch_size' takes a whole number", "2.5")),
    "bool for number": ("num_steps: True", 0, ("'num_steps' takes a whole number", "True")),
    "number for bool": ("skip_prep: 1", 0, ("'skip_prep' takes True or False", "1")),
    "yes for bool": ("control: yes", 0, ("'control' takes True or False", "'yes'")),
    "list for scalar": ("lr: [1, 2]", 0, ("'lr' takes a number",)),
    "mapping for list": ("train_manifests: {a: 1}", 0, ("'train_manifests' takes a list",)),
    "nested list": ("eval_manifests: [[a/b]]", 0, ("'eval_manifests' takes a list",)),
    "null in list": ("eval_manifests: [null]", 0, ("'eval_manifests' takes a list",)),
    "left empty": ("prompt:", 0, ("'prompt' takes text", "None")),
    "octal for text": ("tag: 007", 0, ("'tag' takes text", "needs quotes")),
    "underscore for text": ("experiment_name: 2026_11", 0, ("'experiment_name'", "needs quotes")),
    "decimals for text": ("tag: 1.50", 0, ("'tag' takes text", "needs quotes")),
    "date for text": ("tag: 2026-11-21", 0, ("'tag' takes text",)),
    "tuple for text": ("prompt: (a, b)", 0, ("'prompt'", "tuple")),
    "negative": ("lr: -0.1", 0, ("'lr' must be above 0", "-0.1")),
    "negative seed": ("seed: -1", 0, ("'seed' must be 0 or more",)),
    "nan": ("lr: .nan", 0, ("'lr' must be a finite number", "nan")),
    "infinite": ("max_grad_norm: .inf", 0, ("'max_grad_norm' must be a finite number",)),
    "too large for a float": ("lr: 1e400", 0, ("'lr' must be a finite number",)),
    "share": ("warmdown_share: 1.5", 0, ("'warmdown_share' must be from 0 to 1", "1.5")),
    "closed set": ("precision: fp16", 0, ("'precision' is one of auto, fp32, bf16", "'fp16'")),
    "closed set, case": ("task: ASR", 0, ("'task' is one of asr, ast",)),
    "heal mode": ("heal_modes: [jiont]", 0, ("'jiont' is not one of none, decoder",)),
    "path": ("path: deepest", 0, ("'deepest' is neither own, text, tail",)),
    "device": ("device: gpu", 0, ("device 'gpu' is none; give cpu, cuda",)),
    "variant": ("variant: l4n6", 0, ("'variant'", "'l4n6' is no variant")),
    "shard": ("shard: 5/4", 0, ("shard '5/4' is not i/N",)),
    "manifest": ("valid_manifest: dev-clean", 0, ("'valid_manifest'", "no manifest key")),
    "manifest outside": ("measure_manifest: ../x", 0, ("'measure_manifest'", "no manifest key")),
    "name outside": ("experiment_name: ../x", 0, ("experiment_name '../x'",)),
    "tag outside": ("tag: a/b", 0, ("tag 'a/b'",)),
    "empty hub": ("encoder_hub: ''", 0, ("'encoder_hub' must be named",)),
    "twice": ("lr: 1\nlr: 2", 1, ("duplicate key", '"lr"')),
    "tab": ("\tlr: 1", 0, ("not valid YAML", "lr: 1")),
    "unclosed": ("lr: [1", 0, ("not valid YAML", "lr: [1")),
    "two documents": ("lr: 1\n---\nseed: 2", 1, ("not valid YAML", "document")),
    "control character": ("lr: \x01", 0, ("not valid YAML", "lr:")),
    "merge key": ("<<: {lr: 3}", 0, ("merge keys",)),
    "bad reference": ("lr: !ref <lrr>", 0, ("'lr'", "<lrr>", "did you mean 'lr'")),
    "reference to text": ("lr: !ref <task>", 0, ("'lr' takes a number", "'asr'")),
    "reference to itself": ("lr: !ref <lr>", 0, ("'lr'", "back to itself")),
    "references in a ring": ("lr: !ref <seed>\nseed: !ref <lr>", 1, ("'seed'", "reference")),
    "reference without <>": ("lr: !ref warmup_steps", 0, ("'lr'", "!ref <key>")),
    "bad reference below": (
        "opt_class: !name:torch.optim.SGD\n    momentum: !ref <momentun>",
        0,
        ("'opt_class'", "<momentun>"),
    ),
    "apply": ("seed: !apply:os.getpid []", 0, ("'seed'", "plain value", "!apply:os.getpid")),
    "python object": ("lr: !!python/name:os.system", 0, ("'lr'", "!!python/name:os.system")),
    "include": ("prompt: !include:/etc/hostname", 0, ("'prompt'", "!include")),
    "object for scalar": ("lr: !name:torch.optim.Adam", 0, ("'lr'", "plain value")),
    "scalar for object": ("opt_class: Adam", 0, ("'opt_class' takes an object", "'Adam'")),
    "built for named": ("activation: !new:torch.nn.ReLU", 0, ("'activation'", "!name:")),
    "foreign class": ("opt_class: !name:os.system", 0, ("'opt_class'", "'os.system'")),
    "foreign by a detour": ("activation: !name:torch.os.system", 0, ("'torch.os.system'",)),
    "foreign by import": (
        "activation: !name:torch.utils.collect_env.os.system",
        0,
        ("'torch.utils.collect_env.os.system'",),
    ),
    "foreign dunder": ("activation: !name:torch.nn.ReLU.__init__", 0, ("ReLU.__init__",)),
    "misspelt class": ("activation: !name:torch.nn.Relu", 0, ("torch.nn.Relu", "ReLU?")),
    "misspelt module": ("activation: !name:torch.n.ReLU", 0, ("cannot find 'torch.n.ReLU'",)),
    "a module": ("activation: !name:torch.nn", 0, ("torch.nn is neither a class",)),
    "wrong kind": ("opt_class: !name:torch.nn.Linear", 0, ("'opt_class'", "Optimizer")),
    "no argument": (
        "opt_class: !name:torch.optim.Adam\n    lr: 1\n    weight_decoy: 0.1",
        2,
        ("'opt_class'", "'weight_decoy'", "did you mean 'weight_decay'"),
    ),
    "unnamed argument": ("opt_class: !name:torch.optim.Adam [3]", 0, ("arguments of",)),
    "apply below": (
        "opt_class: !name:torch.optim.Adam\n    eps: !apply:torch.load [x]",
        0,
        ("'opt_class'", "!apply:torch.load"),
    ),
    "object below": (
        "opt_class: !name:torch.optim.Adam\n    eps: !new:subprocess.Popen [ls]",
        0,
        ("'opt_class'", "'subprocess.Popen'"),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_row_51_53_54_mutated_yaml(write: Write, verbs: Processes, name: str) -> None:
    """Exit 2, one message with file, line and key, nothing written; by each verb in turn, some in their own process."""
    text, line, words = MUTATIONS[name]
    path, number = write(text), list(MUTATIONS).index(name)
    verb = VERBS[number % len(VERBS)]
    if number % 4 == 0:
        message = verbs.run(verb, path, "--check", code=2).message
    else:
        message = refused(verb, path, "--check")
    assert f"{path}, line {FIRST + line}: " in message
    for word in words:
        assert word in message
    assert len(message) < 700
    assert not (verbs.folder / "results").exists()


def wrong_type(key: str) -> str:
    """A value of a type that the key does not take."""
    default = TREE[key]
    if key in EXTENSION_POINTS:
        return "some text"
    if isinstance(default, bool):
        return "perhaps"
    if isinstance(default, (int, float)):
        return "[1]"
    return "{a: 1}"


@pytest.mark.parametrize("kind", ["renamed", "type", "null", "range", "tag"])
def test_row_51_every_key_of_the_base(write: Write, kind: str) -> None:
    """None of them is taken on trust: every key, mutated, is refused with its line."""
    tried = 0
    for key in KEYS:
        head = [line for line in HEAD if not line.startswith(f"{key}:")]
        value, words = "", (f"'{key}'",)
        if kind == "renamed":
            value, words = f"{key}x: 1", (f"unknown key '{key}x'; did you mean",)
        elif kind == "type":
            value = f"{key}: {wrong_type(key)}"
        elif kind == "null" and (TREE[key] is not None):
            value = f"{key}: null"
        elif kind == "tag" and key not in EXTENSION_POINTS:
            value = f"{key}: !new:torch.nn.Identity"
        elif kind == "range":
            wrong = {
                **dict.fromkeys(POSITIVE, 0),
                **dict.fromkeys(NOT_NEGATIVE, -1),
                **dict.fromkeys(SHARES, 2.0),
                **dict.fromkeys(NOT_EMPTY, "''"),
                **dict.fromkeys(CHOICES, "nothing_of_the_kind"),
            }
            value = f"{key}: {wrong[key]}" if key in wrong else ""
            words = (key,)
            if key in wrong and isinstance(TREE[key], float):
                value = value.replace(": 0", ": 0.0").replace(": -1", ": -1.0")
        if not value:
            continue
        path = write(value, head)
        message = refused("train", path, "--check")
        assert f"{path}, line {len(head) + 1}: " in message, message
        assert all(word in message for word in words), message
        tried += 1
    assert tried > 40


def test_row_51_every_key_of_the_base_is_needed(tmp_path: Path) -> None:
    """A file without `base:` must hold every key: the archive of a run, or a base of one's own."""
    lines = BASE.read_text(encoding="utf-8").splitlines()
    for key in KEYS[::4]:  # the check goes over all of them in the same way
        first = next(n for n, line in enumerate(lines) if line.startswith(f"{key}:"))
        last = first + 1
        while last < len(lines) and lines[last].startswith("    "):
            last += 1
        path = tmp_path / "own.yaml"
        path.write_text("\n".join(lines[:first] + lines[last:]) + "\n", encoding="utf-8")
        message = refused("train", path, "--data_folder", "x", "--check")
        assert key in message and str(path) in message, message
    path.write_text(BASE.read_text(encoding="utf-8") + "heal_step: 4\n", encoding="utf-8")
    message = refused("train", path, "--data_folder", "x", "--check")
    assert f"{path}, line {len(lines) + 1}: unknown key 'heal_step'; did you mean" in message
    path.write_text(BASE.read_text(encoding="utf-8").replace("lr: 1.0e-4", "lr: low"))
    assert "'lr' takes a number" in refused("train", path, "--data_folder", "x", "--check")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1: a mapping of keys to values is expected"),
        (b"# a comment\n", "line 1: a mapping"),
        (b"- a\n- b\n", "line 1: a mapping"),
        (b"just text\n", "line 1: a mapping"),
        (b"lr: 3\n", "line 1: has no `base: base/speechllm.yaml`"),
        (b"base:\n", "line 1: 'base' takes a file"),
        (b"base: [a]\n", "line 1: 'base' takes a file"),
        (b"seed: 1\nbase: nowhere.yaml\n", "line 2: base: "),
        (b"base: x\nprompt: caf\xe9\n", "line 2: not UTF-8"),
        (b"\xff\xfeb\0a\0s\0e\0", "line 1: not UTF-8"),
        (b"[" * 600, "nested too deeply"),
    ],
    ids=lambda value: value.decode("latin-1")[:12] if isinstance(value, bytes) else "",
)
def test_row_51_files_that_are_no_leaf(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "leaf.yaml"
    path.write_bytes(content)
    message = refused("train", path, "--check")
    assert str(path) in message and words in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", "abc"), "command line: 'lr' takes a number, given 'abc'"),
        (("--lr=nan",), "'lr' takes a number, given 'nan'"),
        (("--lr=.nan",), "'lr' must be a finite number, given nan"),
        (("--batch_size", "0"), "'batch_size' must be above 0, given 0"),
        (("--block_size", "-2"), "'block_size' must be 0 or more, given -2"),
        (("--lr", "!apply:os.system ['touch HERE']"), "tags are not allowed in values"),
        (("--lr=!ref <seed>",), "tags are not allowed in values"),
        (("--prompt= !!python/object/apply:os.system [x]",), "tags are not allowed in values"),
        (("--heal_mode", "jiont"), "'heal_mode' is one of none, decoder, projector, joint"),
        (("--heal_step", "4"), "unknown key 'heal_step'; did you mean 'heal_steps'"),
        (("--overwrit",), "unknown key 'overwrit'"),
        (("--data_folder",), "'data_folder' takes text, given True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_row_52_overrides(write: Write, verbs: Processes, arguments: tuple, words: str) -> None:
    verb = VERBS[len(arguments[0]) % len(VERBS)]
    message = verbs.run(verb, write("seed: 1"), "--check", *arguments, code=2).message
    assert words in message
    assert not (verbs.folder / "HERE").exists() and not (verbs.folder / "results").exists()


def test_row_52_an_equals_sign_and_the_writing_of_a_number_survive(write: Write) -> None:
    path = write("seed: 1")
    options = ("--prompt=a=b = c", "--tag", "1.50", "--experiment_name=007", "--lr=1e-3")
    shown = good("train", path, "--print_hparams", *options).out
    values = YAML().load(shown)
    assert (values["prompt"], values["tag"]) == ("a=b = c", "1.50")
    assert (values["experiment_name"], values["lr"]) == ("007", 1e-3)


def test_row_53_a_placeholder_says_where_it_is_and_how_to_set_it(
    write: Write, verbs: Processes
) -> None:
    line = 1 + BASE.read_text(encoding="utf-8").splitlines().index(
        next(row for row in BASE.read_text(encoding="utf-8").splitlines() if "!PLACEHOLDER" in row)
    )
    path = write("seed: 1", [HEAD[0]])
    message = verbs.run("train", path, "--check", code=2).message
    for part in (str(path), "--data_folder VALUE", f"{BASE}, line {line}", "`data_folder: VALUE`"):
        assert part in message
    path = write("encoder_hub: !PLACEHOLDER")
    message = verbs.run("measure", path, "--check", code=2).message
    assert "--encoder_hub VALUE" in message and f"{path}, line {FIRST}" in message
    good("train", path, "--check", "--encoder_hub", "x/y")
    good("measure", write("seed: 1", [HEAD[0]]), "--check")  # only training reads the corpus folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("min_seconds: 5\nmax_seconds: 2", "'min_seconds' 5 is above 'max_seconds' 2"),
        (
            "measure_manifest: librispeech/train-clean-100",
            "'measure_manifest' is librispeech/train-clean-100, which is also in 'train_manifests'",
        ),
        ("prepare: os.system", "'os.system' is not in an allowed package"),
        ("prepare: recipes.LibriSpeech.librispeech_prepare.os.system", "prepare takes an object"),
        ("prepare: recipes.LibriSpeech.librispeech_prepare.prepare", "did you mean"),
    ],
)
def test_row_51_keys_that_do_not_fit(write: Write, text: str, words: str) -> None:
    assert words in refused("train", write(text), "--check")


def test_the_check_imports_no_model_code_and_looks_at_the_data(
    shared_data: Path, run_verb: Any, tmp_path: Path
) -> None:
    """What it needs is seconds, not memory: torch is not even imported for a leaf that names no object of its own."""
    leaf = REPO_ROOT / "hparams/librispeech_qwen7b.yaml"
    corpus = shared_data / "librispeech_mini"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', {str(leaf)!r}, '--check', '--data_folder', {str(corpus)!r}]\n"
        f"try: runpy.run_path({str(REPO_ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as leave: assert leave.code == 0, leave.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    (tmp_path / "check.py").write_text(code)
    done = run_verb(str(tmp_path / "check.py"))
    assert "splits dev-clean, test-other, train-clean-100" in done.stdout
    assert "lacks train-clean-360, train-other-500, test-clean of librispeech" in done.stdout
    assert "not prepared: loquacious/dev; run: python recipes/Loquacious" in done.stdout
    assert "Qwen/Qwen2.5-7B is not pinned: revision main may change" in done.stderr
    assert re.search(r"ok \(\d+ keys\)", done.stdout)
    gone = good("train", leaf, "--check", "--data_folder", "/no/such/folder").out
    assert "note: data_folder: no such folder: /no/such/folder" in gone and "ok (" in gone
    told = run("train", leaf, "--dry_run", "--data_folder", corpus, "--results_folder", tmp_path)
    assert told.code == 0 and "splits dev-clean" in told.out
