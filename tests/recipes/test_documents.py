"""README and docs tell the truth: commands exist, links lead somewhere, keys are keys, messages are printed, numbers
are those of the committed results. (Commands on leaves are also run through --check, in test_leaf_documents.py.)"""

from __future__ import annotations

import ast
import csv
import re
import shlex
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from speechllm_prune.cli import RUN_OPTIONS
from speechllm_prune.reporting import budget
from speechllm_prune.usage import OWN_KEYS, own_keys
from tests.conftest import REPO_ROOT
from tests.recipes.leaves import VERBS
from tests.recipes.verbs import BASE, good, run

PAGES = sorted(
    page.relative_to(REPO_ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "recipes/*/README.md", "benchmarks/README.md")
    for page in REPO_ROOT.glob(pattern)
)
RUN_AS_PRINTED = ("docs/EXTENDING.md", "docs/SHIPPING.md")
"""Their commands need files that their own tests make."""
ELSEWHERE = set(
    # torchrun, sbatch
    "nodes nnodes nproc_per_node rdzv_backend rdzv_id rdzv_endpoint standalone "
    # SpeechBrain's and a stand-in for any key, in the table for its users
    "test_only key".split()
)
"""Options of other programs that the pages show."""


def text_of(page: str) -> str:
    return (REPO_ROOT / page).read_text(encoding="utf-8")


def base_keys() -> set[str]:
    return set(YAML().load(BASE.read_text(encoding="utf-8")))


def sources(*patterns: str) -> dict[Path, str]:
    files = [file for pattern in patterns for file in REPO_ROOT.glob(pattern)]
    return {file: file.read_text(encoding="utf-8") for file in files}


# ---------------------------------------------------------------------------------------------- links
def anchors(text: str) -> set[str]:
    """Anchors that a renderer makes of headings."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (REPO_ROOT / page).parent / name if name else REPO_ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_a_file_that_is_shown_in_the_tree_exists() -> None:
    """The annotated trees of README and ARCHITECTURE."""
    shown = 0
    for page in ("README.md", "docs/ARCHITECTURE.md"):
        for block in re.findall(r"^```\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
            for name in re.findall(
                r"(?<![\w/<>.])((?:\w+/)*[\w.]+\.(?:py|yaml|md)|\w+/)(?=[\s:,]|$)", block
            ):
                places = ("", "speechllm_prune/", "docs/", "tests/")
                assert any((REPO_ROOT / place / name).exists() for place in places), (page, name)
                shown += 1
    assert shown > 30


# ---------------------------------------------------------------------------------------------- commands
def command_lines(page: str) -> list[str]:
    """Lines of code blocks and spans of code that begin like a command."""
    text = text_of(page).replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`]+)`", prose)
    starts = "python |torchrun |bash |make |sbatch |pip |[A-Z_]+=[^ ]+ (?:bash|python) "
    return [line for line in lines if re.match(starts, line)]


def words_of(line: str) -> list[str]:
    """The command without environment, comment and optional parts."""
    line = re.sub(r"\[[^]]*\]", "", line.split("  (")[0])
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def test_commands_are_found() -> None:
    assert len(command_lines("README.md")) > 15 and len(command_lines("docs/REPRODUCING.md")) > 5


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_ROOT)
    for line in command_lines(page):
        program, *words = words_of(line)
        if program == "make":
            targets = re.findall(r"^([\w.]+):", text_of("Makefile"), re.MULTILINE)
            assert set(words) <= {*targets, ".venv"}, line
        elif program == "pip":
            project = tomllib.loads(text_of("pyproject.toml"))["project"]
            for extra in re.findall(r"\.\[([\w,]+)\]", line):
                assert set(extra.split(",")) <= set(project["optional-dependencies"]), line
        elif program == "python" and words[0] == "-m":
            module = REPO_ROOT / (words[1].replace(".", "/") + ".py")
            assert module.is_file() or words[1] in ("pytest", "pip"), line
        else:
            script = next((word for word in words if word.endswith((".py", ".sh", ".sbatch"))), "")
            if not script and program == "torchrun":
                continue  # what is to be put in front of a command
            if page in RUN_AS_PRINTED and not (REPO_ROOT / script).is_file():
                continue
            assert (REPO_ROOT / script).is_file(), f"{page}: {line}"
            check_options(page, line, script, words[words.index(script) + 1 :], tmp_path)


def check_options(page: str, line: str, script: str, words: list[str], tmp_path: Path) -> None:
    """Every option of a command is one of its script; a command on a leaf passes --check."""
    verb = script.removesuffix(".py")
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    if verb in VERBS:
        if words and words[0].startswith("hparams/") and "..." not in words:
            if page in RUN_AS_PRINTED or "mine" in words[0] or words[0].endswith("*.yaml"):
                return
            data = ["--data_folder", "corpus"] if verb == "train" and len(words) == 1 else []
            good(verb, *words, *data, "--check", "--results_folder", tmp_path)
        return
    known = text_of(script)
    if script.endswith("_prepare.py"):
        known += text_of("speechllm_prune/data/preparation.py")
    for option in options:
        assert f'"{option}"' in known or f"{option})" in known or f" {option}" in known, (
            page,
            line,
        )


def test_every_option_named_is_an_option() -> None:
    """Wherever a page says `--word`: a key of the base, a switch of a verb, or an argument of some script."""
    scripts = sources("*.py", "speechllm_prune/**/*.py", "recipes/**/*.py", "benchmarks/*.py")
    known = base_keys() | set(RUN_OPTIONS) | ELSEWHERE
    for text in scripts.values():
        known |= set(re.findall(r"add_argument\(\s*[\"']--(\w+)", text))
    known |= set(
        re.findall(r'^        "(\w+)": "', text_of("speechllm_prune/cli.py"), re.MULTILINE)
    )
    known |= {"export", "help"}
    for text in sources("recipes/**/*.sh", "recipes/**/*.sbatch").values():
        known |= set(re.findall(r"--(\w+)[)| ]", text))
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--([a-z]\w+)", text_of(page)):
            assert option in known, f"{page}: --{option}"


def test_every_key_of_the_base_is_read_somewhere() -> None:
    code = "\n".join(sources("*.py", "speechllm_prune/**/*.py").values())
    text = BASE.read_text(encoding="utf-8")
    for key in base_keys():
        read = re.search(rf"""\[["']{key}["']\]|\bhparams\.{key}\b|\[f?["'][^"']*{key}""", code)
        assert read or f"<{key}>" in text or key in ("train_logger",), key


# ---------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("verb", [*VERBS, "report", "transcribe"])
def test_help_fits_a_screen_and_has_an_example(verb: str) -> None:
    lines = good(verb, "--help").out.splitlines()
    assert 15 < len(lines) <= 50
    assert any(line.strip().startswith(f"python {verb}.py ") for line in lines)
    if verb in VERBS:
        assert own_keys(verb) in "\n".join(lines)
        assert set(OWN_KEYS[verb].split()) <= base_keys()


def test_help_shows_what_the_base_says() -> None:
    lines = [line.split() for line in own_keys("heal").splitlines()]
    assert "--heal_mode joint decoder | projector | joint | none (with compensate)".split() in lines


# ---------------------------------------------------------------------------------------------- messages
def messages() -> list[str]:
    """Every text in the code, with a mark where a value is put in."""
    found = []
    for text in sources("*.py", "speechllm_prune/**/*.py", "recipes/**/*.py").values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def symptoms() -> list[str]:
    """What stands in code in the first column of the tables of TROUBLESHOOTING."""
    rows = [line for line in text_of("docs/TROUBLESHOOTING.md").splitlines() if line[:2] == "| "]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


NO_MESSAGES = {"num_capped", "metrics.json"}


def test_quoted_messages_are_printed_by_the_code() -> None:
    """The words between the dots stand in one message, in this order."""
    known = messages()
    quoted = [text for text in symptoms() if text not in NO_MESSAGES]
    assert len(quoted) > 30
    for text in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in text.split("..."))
        assert any(re.search(pattern, one, re.DOTALL) for one in known), text


# ---------------------------------------------------------------------------------------------- numbers
def test_reproducing_quotes_the_budget() -> None:
    lines = text_of("docs/REPRODUCING.md").splitlines()
    assert set(budget.table().splitlines()) - set(lines) == set()
    size = budget.features_gib("librispeech", "microsoft/wavlm-large")
    assert f"would take {size:.0f} GiB" in text_of("docs/REPRODUCING.md")


def points() -> dict[tuple[str, str], dict[str, float]]:
    """{(variant, set): {seed: value}} of the committed demo."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    with open(REPO_ROOT / "docs/demo/points.csv", newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            found[row["variant"], row["eval_set"]][row["seed"]] = float(row["value"])
    return found


def demo_section() -> str:
    (section,) = re.findall(
        r"^## What the demo shows\n(.*?)^## ", text_of("README.md"), re.M | re.S
    )
    return section


def test_readmes_table_is_that_of_the_committed_points() -> None:
    sets = ("demo-test-clean", "demo-test-other", "demo-ood")
    modes = ("none", "decoder", "projector", "joint")
    known, rows = points(), 0
    for line in demo_section().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not re.match(r"\d+", cells[0]) or len(cells) != 5:
            continue
        rows += 1
        removed = int(re.match(r"\d+", cells[0])[0])  # type: ignore[index]
        share = re.search(r"\((\d+) %\)", cells[0])
        assert share is None or int(share[1]) == round(100 * removed / 12)
        for mode, cell in zip(modes, cells[1:], strict=True):
            if not cell:
                continue
            pattern = rf"l\d\dn{removed:02d}-{mode}" if removed else "full"
            for name, shown in zip(sets, cell.split(" / "), strict=True):
                values = [
                    value
                    for (variant, eval_set), seeds in known.items()
                    if re.fullmatch(pattern, variant) and eval_set == name
                    for value in seeds.values()
                ]
                assert values and any(f"{value:.2f}" == shown for value in values), (line, name)
    assert rows >= 5


def test_every_decimal_number_of_the_demo_is_committed() -> None:
    """In the README's words about the demo: of points.csv, rounded, or in one of the tables beside it."""
    tables = "\n".join(sources("docs/demo/*.md").values())
    known = {
        form
        for seeds in points().values()
        for value in seeds.values()
        for form in (f"{value:.1f}", f"{value:.2f}")
    }
    known |= {
        form
        for number in re.findall(r"-?\d+\.\d+", tables)
        for form in (number, f"{float(number):.2f}", f"{float(number):.1f}")
    }
    for number in re.findall(r"(?<![\w.-])-?\d+\.\d+(?![\w.])", demo_section()):
        assert number in known, number


@pytest.mark.parametrize("page", PAGES)
def test_nothing_measured_is_left_empty(page: str) -> None:
    """A column `ours` beside the paper's holds numbers or says `not measured`."""
    header: list[str] = []
    for line in text_of(page).splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        header = header or cells
        if not any(title.startswith("paper") for title in header):
            continue
        for title, cell in zip(header, cells, strict=False):
            if title == "ours" and cell not in (title, "---"):
                assert re.search(r"\d", cell) or cell == "not measured", f"{page}: {line}"


def test_unknown_verbs_of_the_pages_would_be_noticed() -> None:
    """The check itself: a wrong key in a command is refused."""
    assert run("train", "hparams/demo.yaml", "--heal_mod", "joint", "--check").code == 2
