"""Rows 54 to 56: code that came in with data or models does not run, models are had offline or not at all, and a token
reaches no file. And a lint: what the package may not contain."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speechllm_prune.hparams import hub_commit
from speechllm_prune.models.decoder import load_decoder
from speechllm_prune.models.encoder import load_encoder
from speechllm_prune.redaction import holds_secret, redact
from speechllm_prune.runtime import UserError
from tests.conftest import REPO_ROOT
from tests.faults.processes import Processes
from tests.recipes.conftest import MakeLeaf
from tests.recipes.verbs import refused, write_leaf

CANARY = "hf_" + "Canary0123456789" * 2
OTHER = "swordfish-is-the-password"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ----------------------------------------------------------------------------------------------- lint
FORBIDDEN = {
    "torch.load without weights_only=True": r"torch\.load\((?![^\n]*weights_only=True)",
    "pickle": r"\bpickle\.(?!UnpicklingError)|\bfrom pickle\b|\b(?:cPickle|dill|joblib|shelve|marshal)\b",
    "yaml.load": r"\byaml\.(?:unsafe_|full_)?load\(",
    "unsafe YAML": r"typ=[\"']unsafe[\"']|\bruamel\.yaml\.Loader\b",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "shell": r"shell=True|os\.system\(|os\.popen\(",
    "archives": r"extractall\(|\.extract\(|unpack_archive\(|\btarfile\b|\bzipfile\b",
    "remote code": r"trust_remote_code(?!=False)",
    "allow_pickle": r"allow_pickle=True",
    "TLS": r"verify=False",
}


def sources() -> list[Path]:
    files = [*REPO_ROOT.glob("*.py"), *(REPO_ROOT / "speechllm_prune").rglob("*.py")]
    return files + sorted((REPO_ROOT / "recipes").rglob("*.py"))


def findings(text: str) -> list[str]:
    """What the lint finds in code, without its comments and docstrings' prose examples."""
    return [
        f"{name}: {match[0]}"
        for name, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text)
    ]


def test_lint_of_the_package() -> None:
    assert len(sources()) > 60
    bad = {str(file): found for file in sources() if (found := findings(file.read_text("utf-8")))}
    assert not bad, bad


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "yaml.load(stream)",
        "x = eval(text)",
        "exec(code)",
        "run(command, shell=True)",
        "tar.extractall(folder)",
        "import zipfile",
        "f(trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_lint_sees(line: str) -> None:
    assert findings(line)
    assert not findings(
        "model.eval(); torch.load(file, weights_only=True); run(trust_remote_code=False)"
    )


@pytest.mark.parametrize(
    "name", ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"]
)
def test_no_hub_load_asks_whether_to_run_code(name: str) -> None:
    """Left out, `trust_remote_code` makes transformers ask on a terminal; one `y` would run a downloaded file."""
    for file in sources():
        for match in re.finditer(rf"\b{name}\.from_pretrained\(", file.read_text("utf-8")):
            call = file.read_text("utf-8")[match.start() :].split("\n\n")[0]
            if "`" not in call.splitlines()[0]:
                assert "trust_remote_code=False" in call, (file, call[:200])


# --------------------------------------------------------------------------------------------- models
class Bomb:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


@pytest.fixture(params=["encoder", "decoder"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, wavlm_layer: Path, qwen2: Path):
    """A copy of a model folder, and what loads it."""
    source, load = (
        (wavlm_layer, load_encoder) if request.param == "encoder" else (qwen2, load_decoder)
    )
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model", load


def test_row_54_a_pickle_of_weights_is_read_as_tensors_or_not_at_all(
    hub: tuple[Path, Callable], tmp_path: Path
) -> None:
    folder, load = hub
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load(str(folder))  # WavLM's own repository has nothing else
    torch.save(tensors | {"x": Bomb(tmp_path / "boom")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle that holds more than tensors.*safetensors"):
        load(str(folder))
    assert not (tmp_path / "boom").exists()


def test_row_54_code_beside_a_model_does_not_run(
    hub: tuple[Path, Callable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, load = hub
    config = json.loads((folder / "config.json").read_text())
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config |= {"model_type": "evil", "auto_map": dict.fromkeys(classes, "evil.Evil")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'boom')!r})\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")  # somebody at the keyboard says yes
    with pytest.raises(UserError, match="is no model of this kind"):
        load(str(folder))
    assert not (tmp_path / "boom").exists()


# ------------------------------------------------------------------------------------------------ hub
def fill_cache(cache: Path, hub: str, folder: Path) -> None:
    """Put a model into a cache as the hub client lays it out."""
    root = cache / f"models--{hub.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    shutil.copytree(folder, root / "snapshots" / COMMIT)


def test_row_55_offline(make_leaf: MakeLeaf, verbs: Processes, qwen2: Path, tmp_path: Path) -> None:
    """Out of the cache a model loads; what is not there, or not in this revision, is a message with what to do."""
    cache = tmp_path / "cache"
    fill_cache(cache, "somebody/tiny", qwen2)
    (tmp_path / "text").write_text("four little dogs\nnear the old house\n")
    options = ("--measure_input", "text", "--text_file", tmp_path / "text")
    inject = [("hub_cache", str(cache))]
    leaf = make_leaf(decoder_hub="somebody/tiny").leaf
    verbs.run("measure", leaf, *options, inject=inject)
    for changes in ({"decoder_hub": "somebody/gated"}, {"decoder_revision": "v2"}):
        leaf = make_leaf(**({"decoder_hub": "somebody/tiny"} | changes)).leaf
        ended = verbs.run("measure", leaf, *options, "--overwrite", inject=inject, code=2)
        hub = changes.get("decoder_hub", "somebody/tiny")
        for part in (
            f"hf download {hub}",
            str(cache),
            "decoder_revision",
            "gated",
            "--decoder_hub",
        ):
            assert part in ended.message


def test_the_commit_of_a_cached_model(tmp_path: Path, qwen2: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    fill_cache(tmp_path, "somebody/tiny", qwen2)
    assert hub_commit("somebody/tiny", None) == hub_commit("somebody/tiny", COMMIT) == COMMIT
    assert hub_commit("somebody/tiny", "v2") is None and hub_commit(str(qwen2), None) is None


# ------------------------------------------------------------------------------------------- secrets
def holding(folder: Path, *secrets: str) -> list[str]:
    """Files below a folder that hold one of the secrets."""
    return [
        str(file)
        for file in folder.rglob("*")
        if file.is_file() and any(secret.encode() in file.read_bytes() for secret in secrets)
    ]


def test_row_56_a_token_of_the_environment_reaches_no_file(
    make_leaf: MakeLeaf, verbs: Processes
) -> None:
    study = make_leaf()
    env = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY, "MY_API_KEY": OTHER}
    few = ("--num_steps", 2, "--valid_interval", 2)
    for verb, *options in (("train", *few), ("measure",), ("prune", "--block_size", 2, "--export")):
        verbs.run(verb, study.leaf, *options, env=env)
    assert (study.root / "train/DONE.json").is_file()
    assert (study.root / "train/log.txt").is_file() and (study.root / "train/env.log").is_file()
    assert not holding(study.results, CANARY, OTHER)
    assert not holding(verbs.folder, CANARY, OTHER), "stdout and stderr"


@pytest.mark.parametrize("secret", [CANARY, OTHER, "https://me:" + "word123@host/x"])
@pytest.mark.parametrize("place", ["key", "comment", "pair", "equals", "unknown", "wrong type"])
def test_row_56_a_token_in_yaml_or_arguments_is_refused_and_not_repeated(
    make_leaf: MakeLeaf, verbs: Processes, secret: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", OTHER)
    study = make_leaf()
    arguments: list[str] = []
    if place == "key":
        write_leaf(study.leaf, study.values | {"results_note": f"made with {secret}"})
    elif place == "comment":
        study.leaf.write_text(study.leaf.read_text() + f"# {secret}\n")
    elif place == "pair":
        arguments = ["--prompt", secret]
    elif place == "equals":
        arguments = [f"--prompt={secret}"]
    elif place == "unknown":
        arguments = ["--token", secret]
    else:
        arguments = ["--lr", secret]
    if secret == CANARY:
        message = verbs.run(
            "train", study.leaf, *arguments, code=2, env={"MY_API_KEY": OTHER}
        ).message
    else:
        message = refused("train", study.leaf, *arguments)
    assert "looks like an access token" in message and "HF_TOKEN" in message
    assert secret not in message and not study.results.exists()
    if place in ("key", "comment"):
        assert f"{study.leaf}, line " in message


def test_row_56_messages_and_logs_are_blanked(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    import logging

    from speechllm_prune.redaction import RedactingFilter
    from speechllm_prune.runtime import verb

    monkeypatch.setenv("MY_API_KEY", OTHER)

    @verb
    def failing(argv: list[str]) -> None:
        raise UserError(f"no access with {CANARY} or {OTHER}")

    assert failing([]) == 2
    assert redact(f"{CANARY} {OTHER}") == "[redacted] [redacted]"
    record = logging.LogRecord("x", logging.INFO, "f", 1, "header %s", (CANARY,), None)
    assert RedactingFilter().filter(record) and record.getMessage() == "header [redacted]"
    for harmless in ("hf_librispeech_qwen7b", "Transcribe speech to text.", COMMIT, "/a/b:c@d"):
        assert not holds_secret(harmless)


def test_row_56_the_message_of_a_verb_is_blanked(capsys: pytest.CaptureFixture) -> None:
    from speechllm_prune.runtime import verb

    @verb
    def failing(argv: list[str]) -> None:
        raise UserError(f"401 for {CANARY}")

    assert failing([]) == 2
    assert capsys.readouterr().err == "error: 401 for [redacted]\n"
