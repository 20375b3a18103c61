"""What the stages of one command share: device, ranks, the model in its stage-1 state, and the splits it has opened.

A sweep runs many stages on one workbench: the model is loaded once, every split is opened once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import (
    ddp_broadcast,
    if_main_process,
    is_distributed_initialized,
)
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from speechllm_prune.cli import Run
from speechllm_prune.data.batching import Batch, sorted_batches
from speechllm_prune.data.features import FeatureStore, store_fingerprint, write_store
from speechllm_prune.data.manifest import Row, manifest_path, read_manifest, read_summary
from speechllm_prune.data.pipeline import Utterances, make_utterances, misfit, refuse_misfits
from speechllm_prune.experiment import read_json, sha256_file
from speechllm_prune.hparams import hub_commit, hub_fingerprint, identity, with_values
from speechllm_prune.lock import RunLock
from speechllm_prune.models.encoder import SpeechEncoder
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.objects import find_callable
from speechllm_prune.ranks import (
    InStep,
    check_agreement,
    memory_fault,
    start_ranks,
    world_size,
)
from speechllm_prune.restore import choose_device, frozen_dtype, restore
from speechllm_prune.runtime import Fault, Stopped, UserError, seed_everything


class Workbench:
    """One process's view of a run.

    Arguments
    ---------
    run : Run
        From `open_run`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.hparams = run.hparams
        self.experiment = run.experiment
        self.device = choose_device(self.hparams["device"])
        backend = run.run_options.get("distributed_backend") or (
            "nccl" if self.device.startswith("cuda") else "gloo"
        )
        start_ranks(backend, self.hparams["ddp_timeout_minutes"])
        self.world_size = world_size()
        self.rank = torch.distributed.get_rank() if is_distributed_initialized() else 0
        check_agreement({**run.values, "the flags": vars(run.flags)})
        if self.device == "cuda" and self.world_size > 1:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(
                self.device
            )  # streams and memory counts are those of the current one
        self.run_options = {
            **run.run_options,
            "distributed_backend": backend,
            "device": self.device,
            "precision": "bf16" if self.dtype == torch.bfloat16 else "fp32",
            "grad_accumulation_factor": self.hparams["grad_accumulation_factor"],
            "max_grad_norm": self.hparams["max_grad_norm"],
            "ckpt_interval_minutes": self.hparams["ckpt_interval_minutes"],
        }
        if not sys.stderr.isatty() or self.rank > 0:
            disable_progress_bar()  # of transformers; ours look for themselves
        self._model: SpeechLLM | None = None
        self._batch: Batch | None = None
        self._utterances: dict[tuple[str, bool], Utterances] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        return frozen_dtype(self.hparams["precision"], self.device)

    def seed(self, stage: str) -> None:
        """Seed this rank for a stage, independently of what ran before."""
        seed_everything(self.hparams["seed"], stage, self.rank)

    def on_main(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run on rank 0 only; every rank gets the result, or the user error."""
        result: Any = None
        if if_main_process():
            try:
                result = function(*args, **kwargs)
            except (UserError, Fault, Stopped) as error:
                result = error
        result = ddp_broadcast(result)
        if isinstance(result, (UserError, Fault, Stopped)):
            raise result
        return result

    @contextmanager
    def working_on(self, stage: str, config_hash: str) -> Iterator[bool]:
        """Context around the work of a stage: whether there is any (`Experiment.begin`).

        No other run can write in the stage's folder meanwhile, and a signal leaves STOPPED.json there.
        """
        overwrite = self.run.flags.overwrite
        with self.writing(
            stage, config_hash, locks=not self.experiment.is_done(stage) or overwrite
        ):
            yield self.on_main(self.experiment.begin, stage, config_hash, overwrite)

    @contextmanager
    def writing(self, stage: str, config_hash: str, locks: bool = True) -> Iterator[None]:
        """Context: this run writes in a stage's folder, alone; a signal leaves STOPPED.json there."""
        locks = self.on_main(lambda: locks)
        lock = RunLock(self.experiment.stage(stage))
        if locks:
            self.on_main(lambda: lock.acquire() and None)
        try:
            yield
        except Stopped as reason:
            if if_main_process():
                self.experiment.stopped(stage, config_hash, str(reason), **reason.facts)
            raise
        except torch.OutOfMemoryError as error:
            kind = "eval" if stage.startswith("eval") else "measure"
            raise memory_fault(error, self._model, self._batch, f"{kind}_batch_size") from None
        finally:
            if locks and if_main_process():
                lock.release()

    def models(self) -> dict[str, dict[str, Any]]:
        """Where encoder and decoder come from, and what identifies them."""
        return {
            side: {
                "hub": self.hparams[f"{side}_hub"],
                "revision": self.hparams[f"{side}_revision"],
                "fingerprint": hub_fingerprint(
                    self.hparams[f"{side}_hub"], self.hparams[f"{side}_revision"]
                ),
                "commit": hub_commit(self.hparams[f"{side}_hub"], self.hparams[f"{side}_revision"]),
            }
            for side in ("encoder", "decoder")
        }

    def require_training(self) -> None:
        """Refuse to go on without a finished train stage, or with other data under the names it was trained on."""
        command = self.run.command("train", "--data_folder FOLDER")
        done = self.experiment.require("train", command) / "DONE.json"
        self.experiment.check_inputs(done, read_json(done))

    @contextmanager
    def overridden(self, values: dict[str, Any]) -> Iterator[None]:
        """Context: some keys have other values (of a healing, say), in what runs and in what is archived."""
        run = self.run
        text = with_values(run.text, values)
        self.run = replace(run, hparams=run.hparams | values, text=text, values=identity(text))
        self.hparams = self.run.hparams
        try:
            yield
        finally:
            self.run, self.hparams = run, run.hparams

    # ------------------------------------------------------------ model and data

    @property
    def model(self) -> SpeechLLM:
        """The full model in its stage-1 state, loaded on first use."""
        if self._model is None:
            self.require_training()
            self._model = restore(self.experiment, "full", self.hparams, self.device)
        return self._model

    def adopt(self, model: SpeechLLM) -> None:
        """Use a model that is at hand instead of loading it."""
        self._model = model

    def rows(self, key: str) -> list[Row]:
        """Rows of a manifest such as `librispeech/test-clean`."""
        file = self.manifest(key)
        if self.world_size > 1:
            digest = sha256_file(file) if file.is_file() else None
            check_agreement({f"the manifest {key}": digest})
        rows = read_manifest(file)
        if self.run.flags.debug:
            rows = rows[:16]
        return rows

    def manifest(self, key: str) -> Path:
        """CSV of a manifest key."""
        return manifest_path(self.hparams["manifest_folder"], key)

    def is_prepared(self, key: str) -> bool:
        """Whether a manifest is there and complete."""
        return self.manifest(key).is_file() and self.manifest(key).with_suffix(".json").is_file()

    def utterances(self, key: str, shuffle_audio: bool = False) -> Utterances:
        """A split, ready to be batched; with `cache_features` its encoder features are computed on first use."""
        if (key, shuffle_audio) not in self._utterances:
            self._utterances[key, shuffle_audio] = self.make_utterances(
                key, self.rows(key), shuffle_audio
            )
        return self._utterances[key, shuffle_audio]

    def make_utterances(self, key: str, rows: list[Row], shuffle_audio: bool = False) -> Utterances:
        """Like `utterances`, for chosen rows of a manifest."""
        refuse_misfits(self.model, rows, key)
        audio_of = next_audio(rows) if shuffle_audio else None
        features = self.features(key) if self.hparams["cache_features"] else None
        return make_utterances(rows, self.model, features, audio_of)

    def features(self, key: str) -> FeatureStore:
        """The feature store of a manifest, written on first use (by rank 0)."""
        encoder = self.model.encoder
        fingerprint = store_fingerprint(
            hub_fingerprint(self.hparams["encoder_hub"], self.hparams["encoder_revision"]),
            self.hparams["encoder_output_norm"],
            encoder.dtype,
            read_summary(self.manifest(key)),
        )
        folder = Path(self.hparams["results_folder"]) / "features" / fingerprint
        self.on_main(self._write_features, key, folder, encoder)
        return FeatureStore(folder)

    def _write_features(self, key: str, folder: Path, encoder: SpeechEncoder) -> None:
        if FeatureStore.exists(folder):
            return
        rows = read_manifest(self.manifest(key))
        every = make_utterances(
            [row for row in rows if misfit(self.model, row, 1) is None], self.model
        )
        index = sorted_batches(every.sizes, self.hparams["eval_batch_size"])
        batches = self.progress(every.loader(index, self.hparams["num_workers"]), f"encoding {key}")
        write_store(folder, encoder, (batch.to(self.device) for batch in batches))

    def sorted_loader(
        self, utterances: Utterances, batch_size: int, batch_positions: int = 0
    ) -> Iterator[Batch]:
        """This rank's share of a split, longest first, on the device."""
        index = sorted_batches(
            utterances.sizes, batch_size, self.rank, self.world_size, batch_positions
        )
        return self.on_device(utterances.loader(index, self.hparams["num_workers"]))

    def on_device(self, batches: Any) -> Iterator[Batch]:
        """Move batches to the device; before each, all ranks agree whether a signal asks them to stop."""
        for batch in InStep(batches):
            self._batch = batch
            yield batch.to(self.device)

    @property
    def shows_progress(self) -> bool:
        """Bars are for rank 0 of a terminal."""
        return (
            self.rank == 0
            and sys.stderr.isatty()
            and not self.run_options.get("noprogressbar", False)
        )

    def progress(self, items: Any, text: str, total: int | None = None) -> Any:
        """A progress bar on rank 0 of a terminal, nothing elsewhere."""
        return tqdm(
            items, desc=text, total=total, disable=not self.shows_progress, dynamic_ncols=True
        )

    def prepare(self) -> None:
        """Prepare the manifests of the training corpus; other corpora are prepared by their own command.

        A split that only evaluation needs and that the corpus lacks is a warning here.
        """
        self._check_manifest_keys()
        if self.hparams["skip_prep"]:
            return
        corpus = self.hparams["train_manifests"][0].split("/")[0]
        needed = [
            *self.hparams["train_manifests"],
            self.hparams["valid_manifest"],
            self.hparams["measure_manifest"],
        ]
        prepare = find_callable(self.hparams["prepare"], tuple(self.run.flags.allow_module))
        folder = Path(self.hparams["manifest_folder"]) / corpus

        def of_corpus(keys: list[str]) -> list[str]:
            return list(
                dict.fromkeys(key.split("/", 1)[1] for key in keys if key.split("/")[0] == corpus)
            )

        options = {"max_bad_share": self.hparams["max_bad_share"]}
        self.on_main(prepare, self.hparams["data_folder"], folder, of_corpus(needed), **options)
        for split in of_corpus(self.hparams["eval_manifests"]):
            try:
                self.on_main(prepare, self.hparams["data_folder"], folder, [split], **options)
            except UserError as error:
                print(f"warning: {corpus}/{split} cannot be evaluated: {error}", file=sys.stderr)

    def _check_manifest_keys(self) -> None:
        """Refuse a wrong key before hours of training, not after."""
        if not self.hparams["train_manifests"]:
            raise UserError(
                "train_manifests is empty; name at least one, such as librispeech/train-clean-100"
            )
        for name in ("train_manifests", "eval_manifests"):
            for key in self.hparams[name]:
                self.manifest(key)
        for name in ("valid_manifest", "measure_manifest"):
            self.manifest(self.hparams[name])


def next_audio(rows: list[Row]) -> dict[str, str]:
    """Give every utterance the audio of the one after next in length, so that only the words are wrong, not the length.

    Example
    -------
    >>> rows = [Row(name, seconds, "x", "y") for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    >>> next_audio(rows)
    {'a': 'b', 'b': 'c', 'c': 'a'}
    """
    ordered = [row.ID for row in sorted(rows, key=lambda row: (row.duration, row.ID))]
    return dict(zip(ordered, ordered[1:] + ordered[:1], strict=True))


def text_batches(
    sequences: list[list[int]], batch_size: int, pad: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Right-padded `input_ids` and `attention_mask`, longest first, for text mode; `index` says which sequences."""
    for index in sorted_batches([len(ids) for ids in sequences], batch_size):
        length = max(len(sequences[i]) for i in index)
        ids = torch.tensor([sequences[i] + [pad] * (length - len(sequences[i])) for i in index])
        mask = torch.tensor(
            [[1] * len(sequences[i]) + [0] * (length - len(sequences[i])) for i in index]
        )
        yield {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "index": torch.tensor(index),
        }
