"""The training loop of stage 1 and of healing: a `speechbrain.Brain` whose nominal epoch is `valid_interval` steps.

The loss is summed over labels and divided, once per optimiser step, by the number of labels in all micro-batches of all
ranks: how a step is cut into micro-batches and ranks cannot change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import ddp_all_reduce, is_distributed_initialized
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from speechllm_prune.checkpoint import AtomicCheckpointer, StateDicts, TrainableState
from speechllm_prune.data.batching import Batch, EndlessBatchSampler
from speechllm_prune.inference import Hypothesis, decode_batch
from speechllm_prune.models.speechllm import LossSums, SpeechLLM
from speechllm_prune.prune.distill import TeacherRows
from speechllm_prune.runtime import Stopped, stop_requested
from speechllm_prune.tasks import TASKS, score


class LinearWarmdown(LambdaLR):
    """Linear warm-up, a plateau, then a linear fall: `warmdown_share` = 1 falls over all steps, as in the paper.

    Arguments
    ---------
    optimizer : Optimizer
        Its learning rates are the peaks.
    num_steps : int
        Optimiser steps of the whole run.
    warmup_steps : int
        Steps of linear rise.
    final_lr_share : float
        Share of the peak at the end.
    warmdown_share : float
        Share of the run over which the rate falls.

    Example
    -------
    >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = LinearWarmdown(optimizer, num_steps=4)
    >>> [scheduler.share(step) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        warmup_steps: int = 0,
        final_lr_share: float = 0.0,
        warmdown_share: float = 1.0,
    ) -> None:
        self.num_steps, self.warmup_steps = num_steps, warmup_steps
        self.final_lr_share, self.warmdown_share = final_lr_share, warmdown_share
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """Share of the peak for the update after `step` updates."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall_steps = max(1.0, self.warmdown_share * self.num_steps)
        left = min(1.0, max(0.0, (self.num_steps - step) / fall_steps))
        return min(warmup, self.final_lr_share + (1 - self.final_lr_share) * left)


class Counters:
    """What the run has seen, over all ranks: labels, utterances, seconds of audio; and the last step it validated.

    Sums stay on the device; reading them waits for it.
    """

    NAMES = ("labels", "utterances", "seconds")

    def __init__(self, device: str) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.validated_step = 0

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        seen = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        return seen | {"validated_step": self.validated_step}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """From the checkpoint."""
        self.validated_step = int(state["validated_step"])
        self.sums.copy_(torch.tensor([state[name] for name in self.NAMES], dtype=torch.float64))


class SpeechLLMBrain(sb.Brain):
    """Trains the parameters of a SpeechLLM that require gradients.

    Arguments
    ---------
    model : SpeechLLM
        With exactly the parameters to train requiring gradients.
    hparams : dict
        The experiment's.
    num_steps : int
        Optimiser steps of this run (`num_steps` or `heal_steps`).
    valid_interval : int
        Optimiser steps between validations.
    sampler : EndlessBatchSampler
        Of the training loader.
    run_opts : dict
        SpeechBrain's run options.
    checkpointer : AtomicCheckpointer
        Where this run saves.
    train_logger : callable
        Has `log_stats`.
    teacher : callable, optional
        Batch -> `TeacherRows`: distillation.
    """

    def __init__(
        self,
        model: SpeechLLM,
        hparams: dict[str, Any],
        num_steps: int,
        valid_interval: int,
        sampler: EndlessBatchSampler,
        run_opts: dict[str, Any],
        checkpointer: AtomicCheckpointer,
        train_logger: Any,
        teacher: Callable[[Batch], TeacherRows] | None = None,
    ) -> None:
        super().__init__(
            modules={"model": model}, hparams=hparams, run_opts=run_opts, checkpointer=checkpointer
        )
        self.model = model
        self.num_steps, self.valid_interval = num_steps, valid_interval
        self.sampler = sampler
        self.train_logger = train_logger
        self.teacher = teacher
        self.task = TASKS[hparams["task"]]
        self.counters = Counters(self.device)
        self.world_size = torch.distributed.get_world_size() if is_distributed_initialized() else 1
        self.batches: Iterator[Batch] | None = None
        self.step = 0  # micro-batch within the optimiser step
        self.totals = self._no_sums()  # since the last validation, on this rank
        self.step_counts = torch.zeros_like(
            self.counters.sums
        )  # of this rank, for the optimiser step under way

    # ------------------------------------------------------------ set-up

    def init_optimizers(self) -> None:
        """One group of everything trainable; optimiser, schedule, sampler and counters join the checkpoint."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in parameters), "what is trained is fp32"
        self.optimizer = self.hparams.opt_class(parameters, lr=self.hparams.lr)
        self.optimizers_dict = {"opt_class": self.optimizer}
        self.scheduler = self.hparams.lr_scheduler(self.optimizer, num_steps=self.num_steps)
        self.checkpointer.add_recoverable("model", TrainableState(self.model))
        self.checkpointer.add_recoverable(
            "state",
            StateDicts(
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                sampler=self.sampler,
                counters=self.counters,
            ),
        )

    def _wrap_distributed(self) -> None:
        if self.distributed_launch:
            # Otherwise the wrapper would broadcast all frozen weights from rank 0.
            frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
            frozen += [name for name, _ in self.model.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        super()._wrap_distributed()

    # ------------------------------------------------------------ training

    def compute_forward(self, batch: Batch, stage: sb.Stage) -> LossSums:
        """Teacher-forced sums over the labels of a batch."""
        return self.modules.model(batch, self.teacher(batch) if self.teacher else None)

    def compute_objectives(self, predictions: LossSums, batch: Batch, stage: sb.Stage) -> Tensor:
        """Mean loss per label of this batch, for display and validation."""
        return predictions.loss / predictions.num_labels

    def fit_batch(self, batch: Batch) -> Tensor:
        """One micro-batch; an optimiser step after every `grad_accumulation_factor` of them."""
        should_step = self.step % self.grad_accumulation_factor == 0
        with self.no_sync(not should_step):
            with self.training_ctx:
                sums = self.compute_forward(batch, sb.Stage.TRAIN)
            # DDP averages gradients over ranks; the step divides by the labels of all ranks, so undo the mean.
            (sums.loss * self.world_size).backward()
        counts = torch.tensor([0.0, len(batch), sum(batch.durations)], dtype=torch.float64)
        self.step_counts += counts.to(self.step_counts.device, non_blocking=True)
        self.step_counts[0] += sums.num_labels
        self.totals = LossSums(
            *(total + part.detach() for total, part in zip(self.totals, sums, strict=True))
        )
        self.sampler.advance()
        if should_step:
            self.optimizers_step()
        return sums.loss.detach() / sums.num_labels

    def optimizers_step(self) -> None:
        """Divide by the global label count, clip over all parameters, update, move the schedule."""
        counts = self.step_counts
        if self.world_size > 1:
            counts = ddp_all_reduce(counts, torch.distributed.ReduceOp.SUM)
        self.counters.sums += counts
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= counts[0].to(parameter.grad.dtype)
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step_counts.zero_()
        self.optimizer_step += 1

    def epochs(self) -> Iterator[int]:
        """Nominal epochs left: an epoch is `valid_interval` optimiser steps, the last one perhaps shorter."""
        while self.optimizer_step < self.num_steps or self._validation_is_due():
            # A run that was stopped after the last step of an epoch validates first.
            begun = self.optimizer_step - self._validation_is_due()
            yield begun // self.valid_interval + 1

    def _validation_is_due(self) -> bool:
        step = self.optimizer_step
        at_end = step == self.num_steps or (step > 0 and step % self.valid_interval == 0)
        return at_end and self.counters.validated_step != step

    def _fit_train(self, train_set: Any, epoch: int, enable: bool) -> None:
        # Brain's own loop counts micro-batches of a finite loader and shows the loss only; ours counts optimiser steps
        # of an endless one, shows what tells alignment from its plateau, and can be stopped between steps.
        self.modules.train()
        self.zero_grad()
        self.step_counts.zero_()
        self.totals = self._no_sums()
        if self.batches is None:
            self.batches = iter(train_set)
        last_step = min(self.num_steps, epoch * self.valid_interval)
        saved = time.monotonic()
        with tqdm(
            total=last_step,
            initial=self.optimizer_step,
            dynamic_ncols=True,
            disable=not enable,
            unit="step",
        ) as bar:
            while self.optimizer_step < last_step:
                for step in range(1, self.grad_accumulation_factor + 1):
                    self.step = step
                    self.fit_batch(next(self.batches).to(self.device))
                bar.update()
                if self.optimizer_step % 10 == 0:  # reading the loss waits for the device
                    bar.set_postfix(self.train_stats(), lr=self.scheduler.get_last_lr()[0])
                stop, minutes = self._agreed_maximum(
                    stop_requested() is not None, (time.monotonic() - saved) / 60
                )
                if stop or 0 < self.ckpt_interval_minutes < minutes:
                    self._checkpoint(validated=False)
                    saved = time.monotonic()
                if stop:
                    raise Stopped(stop_requested() or "a signal on another rank")
        self.step = 0

    def _no_sums(self) -> LossSums:
        return LossSums(*(torch.zeros((), device=self.device) for _ in range(3)))

    def train_stats(self) -> dict[str, float]:
        """Mean loss and teacher-forced token accuracy (percent) since the last validation, on this rank."""
        labels = max(1.0, float(self.totals.num_labels))
        return {
            "loss": float(self.totals.loss) / labels,
            "token_accuracy": 100 * float(self.totals.num_correct) / labels,
        }

    def _agreed_maximum(self, *values: float) -> list[float]:
        """The largest of each value over all ranks, so that all of them decide alike."""
        if self.world_size == 1:
            return list(values)
        shared = torch.tensor([float(value) for value in values], device=self.device)
        return ddp_all_reduce(shared, torch.distributed.ReduceOp.MAX).tolist()

    def _checkpoint(self, validated: bool) -> None:
        key = f"valid_{self.task.metric}"
        meta = {"optimizer_step": self.optimizer_step} | (
            {key: self.valid_value} if validated else {}
        )
        higher = self.task.higher_is_better
        self.checkpointer.save_and_prune(meta, None if higher else key, key if higher else None)

    # ------------------------------------------------------------ validation

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Empty the collected hypotheses."""
        self.hypotheses: list[Hypothesis] = []
        self.valid_sums = torch.zeros(2, device=self.device)

    def evaluate_batch(self, batch: Batch, stage: sb.Stage) -> Tensor:
        """Teacher-forced loss and greedy transcripts of one validation batch."""
        if stop_requested() and self.world_size == 1:
            self._checkpoint(validated=False)
            raise Stopped(stop_requested())
        batch = batch.to(self.device)
        with torch.no_grad():
            sums = self.model(batch)
            self.hypotheses += decode_batch(self.model, batch)
        self.valid_sums += torch.stack([sums.loss.float(), sums.num_labels.float()])
        return (sums.loss / sums.num_labels).cpu()

    def on_stage_end(self, stage: sb.Stage, stage_loss: Any, epoch: int | None = None) -> None:
        """After validation: score, log a line, save a checkpoint."""
        hypotheses = gather(self.hypotheses)
        if self.world_size > 1:
            self.valid_sums = ddp_all_reduce(self.valid_sums, torch.distributed.ReduceOp.SUM)
        hypotheses.sort(key=lambda hypothesis: hypothesis.id)
        self.valid_value = score(
            self.task,
            [h.id for h in hypotheses],
            [h.ref for h in hypotheses],
            [h.hyp for h in hypotheses],
            self.hparams.target_language,
        ).value
        pass_share = self.sampler.position / max(
            1, len(self.sampler.batches_of_pass(self.sampler.pass_number))
        )
        seen = self.counters.state_dict()
        # On all ranks: SpeechBrain's loggers write on rank 0 themselves and then broadcast, which all ranks must join.
        self.train_logger.log_stats(
            {
                "step": self.optimizer_step,
                "lr": self.scheduler.get_last_lr()[0],
                "epochs": round(self.sampler.pass_number + pass_share, 3),
                "utterances": round(seen["utterances"]),
                "audio_hours": round(seen["seconds"] / 3600, 3),
            },
            train_stats=self.train_stats() if self.totals.num_labels else None,
            valid_stats={
                "loss": float(self.valid_sums[0] / self.valid_sums[1]),
                self.task.metric: self.valid_value,
            },
        )
        self.counters.validated_step = self.optimizer_step
        self._checkpoint(validated=True)


def gather(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks."""
    if not is_distributed_initialized():
        return list(items)
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]
