"""Read experiment folders: points, distances, plans, training log. Reads only; what is broken or missing is listed.

A *point* is one variant on one evaluation set (`eval/<variant>/<corpus>-<split>/metrics.json`).
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechllm_prune.experiment import read_json
from speechllm_prune.hparams import identity
from speechllm_prune.reporting.find import changed_inputs, evaluate_command
from speechllm_prune.runtime import UserError
from speechllm_prune.tasks import TASKS

VARIANT = re.compile(
    r"(?P<control>control-)?l(?P<start>\d{2,})n(?P<size>\d{2,})-(?P<mode>[a-z]+)(?:\+(?P<tag>[\w.+-]+))?"
)
MEASURED = ("speech", "text", "speech-no_lora", "text-no_lora")
SHUFFLED = "shuffled_audio"
"""Tag of the sanity check in which every utterance is decoded from another one's audio."""


@dataclass(frozen=True)
class Point:
    """One variant scored on one evaluation set."""

    experiment: str
    seed: str
    variant: str
    corpus: str
    split: str
    task: str
    metric: str
    value: float
    num_utterances: int
    num_layers: int
    start_layer: int | None
    block_size: int
    heal_mode: str
    tag: str
    control: bool
    note: str
    folder: Path
    record: dict[str, Any] = field(repr=False)
    """The whole metrics.json."""

    @property
    def eval_set(self) -> str:
        """Name of the evaluation set, `<corpus>-<split>`."""
        return f"{self.corpus}-{self.split}"

    @property
    def is_full(self) -> bool:
        """Whether this is the unpruned model as trained."""
        return self.variant == "full"

    @property
    def is_pruned(self) -> bool:
        """Whether layers are missing."""
        return self.block_size > 0 and not self.control

    @property
    def drop_percent(self) -> float:
        """Share of the decoder's layers that is removed, in percent."""
        return 100.0 * self.block_size / self.num_layers if self.is_pruned else 0.0


@dataclass(frozen=True)
class Measurement:
    """Angular distances of one decoder under one kind of input, and the path that they give."""

    measure_input: str
    matrix: np.ndarray
    count: int
    num_layers: int
    last_token: str
    manifest: str
    path: dict[int, int]
    margin: dict[int, float | None]
    note: str
    folder: Path
    record: dict[str, Any] = field(repr=False)
    adapters: str = "none"
    """LoRA of the baseline: `none`, `on`, or `off` (`--measure_lora False`)."""
    post_norm: np.ndarray | None = field(default=None, repr=False)
    """[L] distances of the blocks [l, L) with h[L] taken after the final norm."""
    bootstrap_share: dict[int, float] = field(default_factory=dict)


@dataclass
class ExperimentData:
    """Everything that a report needs of one `results/<name>/<seed>` folder."""

    name: str
    seed: str
    folder: Path
    points: list[Point] = field(default_factory=list)
    measurements: dict[str, Measurement] = field(default_factory=dict)
    plans: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    """(start layer, block size) -> the --path choices that selected the block."""
    train_log: list[dict[str, float]] = field(default_factory=list)
    trained: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """The keys of train/hyperparams.yaml; empty without it."""
    incomplete: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name and seed, for headings."""
        return f"{self.name} (seed {self.seed})"

    @property
    def is_random_decoder(self) -> bool:
        """Whether a decoder with random weights was measured, as something to compare with: its name says so."""
        # No training says nothing: text mode measures a pretrained decoder without any.
        return not self.points and self.name.endswith("_random")

    @property
    def task(self) -> str:
        """asr | ast, of an experiment with points."""
        return self.points[0].task

    @property
    def tolerance(self) -> float:
        """Largest accepted relative degradation: that of its YAML, else the task's."""
        return float(self.settings.get("tolerance", TASKS[self.task].tolerance))

    @property
    def dev_set(self) -> str:
        """The set that training was validated on; empty if unknown, or if it is one of the evaluation sets."""
        name = str(self.settings.get("valid_manifest") or "")
        return "" if name in self.settings.get("eval_manifests", []) else name.replace("/", "-")

    @property
    def set_order(self) -> list[str]:
        """All sets with points, in the order of the experiment's `eval_manifests`, any others behind them."""
        named = [name.replace("/", "-") for name in self.settings.get("eval_manifests", [])]
        found = {point.eval_set for point in self.points}
        return [name for name in named if name in found] + sorted(found - set(named))

    @property
    def eval_sets(self) -> list[str]:
        """Sets that the unpruned model was evaluated on (any set, if it was not evaluated at all), without dev."""
        full = {point.eval_set for point in self.points if point.is_full}
        order = [name for name in self.set_order if name != self.dev_set]
        return [name for name in order if name in full] or order

    @property
    def unjudged_sets(self) -> list[str]:
        """Sets of `eval_manifests` that the unpruned model was not evaluated on: no rule can be judged there."""
        full = {point.eval_set for point in self.points if point.is_full}
        named = [name.replace("/", "-") for name in self.settings.get("eval_manifests", [])]
        return [name for name in named if name not in full]

    @property
    def notes(self) -> list[str]:
        """The distinct `results_note`s of everything in the folder."""
        found = [point.note for point in self.points]
        found += [measurement.note for measurement in self.measurements.values()]
        return list(dict.fromkeys(note for note in found if note))

    def baseline(self, eval_set: str) -> Point | None:
        """The unpruned model on a set."""
        return next((p for p in self.points if p.is_full and p.eval_set == eval_set), None)

    def sources(self, start_layer: int, block_size: int) -> list[str]:
        """Which paths choose this block: `own`, `text`, `tail`, or a file."""
        found = list(self.plans.get((start_layer, block_size), []))
        for measure_input, name in (("speech", "own"), ("text", "text")):
            measurement = self.measurements.get(measure_input)
            if measurement and measurement.path.get(block_size) == start_layer:
                found.append(name)
        return sorted(set(found))


# -------------------------------------------------------------------------------------------- reading
def collect(folder: Path) -> ExperimentData:
    """Read one seed folder. Half-written and missing files are listed in `incomplete`, never fatal."""
    folder = Path(folder)
    resolved = folder.resolve()
    data = ExperimentData(name=resolved.parent.name, seed=resolved.name, folder=folder)
    data.trained = (folder / "train" / "DONE.json").is_file()
    data.train_log = read_train_log(folder / "train" / "train_log.txt")
    _read_settings(data)
    _collect_plans(data)
    _collect_points(data)
    for name in filter(lambda name: (folder / "measure" / name).is_dir(), MEASURED):
        try:
            measurement = read_measurement(folder / "measure" / name)
            if changed := changed_inputs(folder, measurement.record):
                raise ValueError(f"left out, {', '.join(changed)} changed since")
            data.measurements[name] = measurement
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            data.incomplete.append(f"measure/{name}: {failure_reason(error)}; run measure.py again")
    for stage_name in ("train", *_children(folder, "heal")):
        stage = folder / stage_name
        if stage.is_dir() and not (stage / "DONE.json").is_file():
            data.incomplete.append(
                f"{stage_name}: not finished (no DONE.json); run its command again to resume"
            )
    for name in _children(folder, "heal"):
        with contextlib.suppress(UserError):  # listed above, or read by nobody
            if changed := changed_inputs(folder, read_json(folder / name / "DONE.json")):
                data.incomplete.append(
                    f"{name}: {', '.join(changed)} changed since; run its command again with --overwrite"
                )
    return data


def _read_settings(data: ExperimentData) -> None:
    file = data.folder / "train" / "hyperparams.yaml"
    try:
        data.settings = identity(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass  # only measured, or copied without it
    except (UserError, OSError, UnicodeDecodeError) as error:
        data.incomplete.append(f"train/hyperparams.yaml: cannot be read ({error})")


def _children(folder: Path, stage: str) -> list[str]:
    parent = folder / stage
    if not parent.is_dir():
        return []
    return [f"{stage}/{child.name}" for child in sorted(parent.iterdir()) if child.is_dir()]


def failure_reason(error: Exception) -> str:
    """What was wrong with a file, as a phrase."""
    return f"no {error} in it" if isinstance(error, KeyError) else str(error)


def _collect_plans(data: ExperimentData) -> None:
    for name in _children(data.folder, "prune"):
        try:
            plan = read_json(data.folder / name / "plan.json")
            block = (int(plan["start_layer"]), int(plan["block_size"]))
            data.plans[block] = [str(source) for source in plan.get("path_sources", [])]
        except (UserError, KeyError, TypeError, ValueError) as error:
            data.incomplete.append(f"{name}: {failure_reason(error)}; run prune.py again")


def _collect_points(data: ExperimentData) -> None:
    listed: set[tuple[str, str]] = set()
    for variant in _children(data.folder, "eval"):
        stale: dict[str, str] = {}
        for name in _children(data.folder, variant):
            try:
                point = read_point(data.folder / name, data.name, data.seed)
                if changed := changed_inputs(data.folder, point.record):
                    stale[point.eval_set] = ", ".join(changed)
                    listed.add((variant, point.eval_set))
                else:
                    data.points.append(point)
            except (UserError, KeyError, TypeError, ValueError) as error:
                data.incomplete.append(f"{name}: {failure_reason(error)}; run evaluate.py again")
                listed.add((variant, name.rpartition("/")[2]))
        if stale:
            data.incomplete.append(
                f"{variant}: left out on {', '.join(stale)}: {', '.join(sorted(set(stale.values())))} changed since; "
                f"run: {evaluate_command(variant.removeprefix('eval/'))} --overwrite"
            )
    expected = {point.eval_set for point in data.points if point.is_full} - {data.dev_set}
    if data.points:
        data.incomplete += [
            f"eval/full: not evaluated on {name} of eval_manifests, where no rule is judged; "
            f"run: {evaluate_command('full')}"
            for name in data.unjudged_sets
            if ("eval/full", name) not in listed
        ]
    for variant in _children(data.folder, "eval"):
        short = variant.removeprefix("eval/")
        seen = {point.eval_set for point in data.points if point.variant == short}
        seen |= {name for other, name in listed if other == variant}
        if SHUFFLED not in short:  # the sanity check is run on one set only, on purpose
            data.incomplete += [
                f"{variant}: not evaluated on {name}; run: {evaluate_command(short)}"
                for name in sorted(expected - seen)
            ]


def read_point(folder: Path, experiment: str, seed: str) -> Point:
    """Read one `eval/<variant>/<corpus>-<split>` folder.

    Raises
    ------
    UserError, KeyError, TypeError, ValueError
        If metrics.json is missing, broken, lacks a field, or contradicts the name of its folder.
    """
    record = read_json(folder / "metrics.json")
    variant = folder.parent.name
    named = VARIANT.fullmatch(variant)
    if record.get("variant", variant) != variant:
        raise ValueError(f"metrics.json is of variant {record['variant']}")
    start, size = record["start_layer"], int(record["block_size"])
    if (
        named
        and not named["control"]
        and (start, size) != (int(named["start"]), int(named["size"]))
    ):
        raise ValueError(f"metrics.json says start layer {start}, block size {size}")
    if named:
        # The name is the authority: a control removes nothing, yet belongs to the block that it controls for.
        start, size = int(named["start"]), int(named["size"])
    if record["value"] is None:
        raise ValueError("metrics.json has no value")
    task = TASKS.get(record["task"])
    if task is None or record["metric"] != task.metric:
        raise ValueError(
            f"metrics.json has task {record['task']!r} with metric {record['metric']!r}"
        )
    return Point(
        experiment=experiment,
        seed=seed,
        variant=variant,
        corpus=str(record["corpus"]),
        split=str(record["split"]),
        task=str(record["task"]),
        metric=str(record["metric"]),
        value=float(record["value"]),
        num_utterances=int(record["num_utterances"]),
        num_layers=int(record["num_layers"]),
        start_layer=start,
        block_size=size,
        heal_mode=named["mode"] if named else str(record["heal_mode"]),
        tag=(named["tag"] or "") if named else variant.partition("+")[2],
        control=bool(named and named["control"]),
        note=str(record.get("note") or ""),
        folder=folder,
        record=record,
    )


def read_measurement(folder: Path) -> Measurement:
    """Read one `measure/<measure_input>[-no_lora]` folder (with NumPy, so that a report needs no torch)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    record = read_json(folder / "path.json")
    try:
        tensors = load_file(folder / "distances.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"distances.safetensors cannot be read ({error})") from None
    matrix = np.asarray(tensors["distance"], dtype=np.float64)
    num_layers = int(record["num_layers"])
    if matrix.shape != (num_layers, num_layers):
        raise ValueError(
            f"distances of shape {matrix.shape}, but path.json has {num_layers} layers"
        )
    return Measurement(
        measure_input=folder.name.removesuffix("-no_lora"),
        matrix=matrix,
        count=int(np.asarray(tensors["count"]).reshape(-1)[0]),
        num_layers=num_layers,
        last_token=str(record["last_token"]),
        manifest=str(record.get("measure_manifest") or ""),
        path={int(n): int(l) for n, l in record["path"].items()},
        margin={int(n): value for n, value in record["margin"].items()},
        note=str(record.get("note") or ""),
        folder=folder,
        record=record,
        adapters=_adapters(record),
        post_norm=tensors.get("distance_post_norm"),
        bootstrap_share={int(n): value for n, value in record.get("bootstrap_share", {}).items()},
    )


def _adapters(record: dict[str, Any]) -> str:
    on = "on" if record.get("measure_lora", True) else "off"
    return on if record.get("decoder_lora_rank") else "none"


def read_train_log(path: Path) -> list[dict[str, float]]:
    """Parse SpeechBrain's FileTrainLogger lines into {key: number}; a file that is missing is an empty log.

    Lines look like `step: 50, lr: 1.00e-03 - train loss: 1.23 - valid loss: 0.9, valid wer: 4.2`.
    """
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        entry: dict[str, float] = {}
        for item in re.split(r" - |, ", line):
            key, separator, text = item.rpartition(":")
            try:
                entry[key.strip()] = float(text)
            except ValueError:
                continue  # not a number: a name or a path in the log
        if entry:
            entries.append(entry)
    return entries
