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
from speechbrain.utils.distributed import ddp_all_reduce
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from speechllm_prune.checkpoint import AtomicCheckpointer
from speechllm_prune.data.batching import Batch, EndlessBatchSampler
from speechllm_prune.inference import Hypothesis, decode_batch
from speechllm_prune.models.speechllm import LossSums, SpeechLLM
from speechllm_prune.prune.distill import TeacherRows
from speechllm_prune.ranks import InStep, agreed_maximum, gather, memory_fault, world_size
from speechllm_prune.recoverables import Counters, RandomStates, StateDicts, TrainableState
from speechllm_prune.runtime import (
    Fault,
    Stopped,
    random_state,
    set_random_state,
    spoken,
    stop_requested,
    warn,
)
from speechllm_prune.schedule import LinearWarmdown as LinearWarmdown  # its name in a YAML
from speechllm_prune.tasks import TASKS, score

TIMED_STEPS = 20
"""Steps after which a run without a progress bar says how long it will take."""


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
        self.world_size = world_size()
        self.random_states = RandomStates()
        self.state_before_validation: dict[str, Any] | None = None
        self.spoilt = False  # whether the optimiser step under way must be skipped
        self.skipped_in_a_row = 0
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
                random=self.random_states,
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
        loss = torch.full((), torch.nan)
        if not self.spoilt:  # else the rest of the step is passed over
            try:
                loss = self._add_gradients(batch, should_step)
            except torch.OutOfMemoryError as error:
                keys = "batch_size or batch_positions (and raise grad_accumulation_factor)"
                raise memory_fault(error, self.model, batch, keys) from None
        self.sampler.advance()
        if should_step:
            self.optimizers_step()
        return loss

    def _add_gradients(self, batch: Batch, should_step: bool) -> Tensor:
        with self.no_sync(not should_step):
            with self.training_ctx:
                sums = self.compute_forward(batch, sb.Stage.TRAIN)
            # Before the gradients of all ranks are summed: after that, no weight could be saved.
            finite = bool(torch.isfinite(sums.loss))
            if agreed_maximum(not finite)[0]:
                ids = gather([] if finite else batch.ids)
                self._spoil(f"the loss of a batch is not finite ({', '.join(ids)})")
                return sums.loss.detach()
            # DDP averages gradients over ranks; the step divides by the labels of all ranks, so undo the mean.
            (sums.loss * self.world_size).backward()
        counts = torch.tensor([0.0, len(batch), sum(batch.durations)], dtype=torch.float64)
        self.step_counts += counts.to(self.step_counts.device, non_blocking=True)
        self.step_counts[0] += sums.num_labels
        self.totals = LossSums(
            *(total + part.detach() for total, part in zip(self.totals, sums, strict=True))
        )
        return sums.loss.detach() / sums.num_labels

    def _spoil(self, reason: str) -> None:
        """Give up the optimiser step under way, on all ranks alike."""
        self.spoilt = True
        if self.random_states.rank == 0:
            warn(f"step {self.optimizer_step + 1} is skipped: {reason}")

    def optimizers_step(self) -> None:
        """Divide by the global label count, clip over all parameters, update, move the schedule.

        A step whose loss or gradient is not finite changes no weight, but counts: batches and learning rate stay
        functions of the step.
        """
        counts = self.step_counts
        if self.world_size > 1:
            counts = ddp_all_reduce(counts, torch.distributed.ReduceOp.SUM)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.spoilt:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= counts[0].to(parameter.grad.dtype)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                self._spoil("the gradient is not finite")
        if not self.spoilt:
            self.counters.sums += counts
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step_counts.zero_()
        self.optimizer_step += 1
        self._count_skipped()

    def _count_skipped(self) -> None:
        """Stop a run that no longer learns."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.spoilt else 0
        self.counters.skipped_steps += self.spoilt
        self.spoilt = False
        if self.skipped_in_a_row >= self.hparams.nonfinite_patience:
            raise Fault(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last is step {self.optimizer_step} (see the "
                "warnings). The weights are finite and so is the last checkpoint: lower lr, or look at the utterances "
                "named, and run the same command again"
            )

    def epochs(self) -> Iterator[int]:
        """Nominal epochs left: an epoch is `valid_interval` optimiser steps, the last one perhaps shorter."""
        self.began_at, self.began = self.optimizer_step, time.monotonic()
        while self.optimizer_step < self.num_steps or self._validation_is_due():
            # A run that was stopped after the last step of an epoch validates first.
            begun = self.optimizer_step - self._validation_is_due()
            yield begun // self.valid_interval + 1

    def timing(self) -> dict[str, Any] | None:
        """How long a step of this process took, validation included; None if all steps were done before it began."""
        steps, seconds = self.optimizer_step - self.began_at, time.monotonic() - self.began
        if not steps:
            return None
        return {
            "seconds_per_step": seconds / steps,
            "num_processes": self.world_size,
            "device": str(self.device),
        }

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
                if not enable:  # else the bar says it
                    self._say_time_left()
                if self.optimizer_step % 10 == 0:  # reading the loss waits for the device
                    bar.set_postfix(self.train_stats(), lr=self.scheduler.get_last_lr()[0])
                stop, minutes = agreed_maximum(
                    stop_requested() is not None, (time.monotonic() - saved) / 60
                )
                if stop or 0 < self.ckpt_interval_minutes < minutes:
                    self._checkpoint(validated=False)
                    saved = time.monotonic()
                if stop:
                    self._raise_stopped(stop_requested() or "a signal on another rank")
        self.step = 0

    def _say_time_left(self) -> None:
        """After this process's first steps: what they took, and what that means for the others."""
        steps, left = self.optimizer_step - self.began_at, self.num_steps - self.optimizer_step
        if steps == TIMED_STEPS and left and self.random_states.rank == 0:
            seconds = (time.monotonic() - self.began) / steps
            print(
                f"time:     {seconds:.2g} s a step over the first {steps}, about {spoken(left * seconds)} left",
                flush=True,
            )

    def _no_sums(self) -> LossSums:
        return LossSums(*(torch.zeros((), device=self.device) for _ in range(3)))

    def train_stats(self) -> dict[str, float]:
        """Mean loss and teacher-forced token accuracy (percent) since the last validation, on this rank."""
        labels = max(1.0, float(self.totals.num_labels))
        return {
            "loss": float(self.totals.loss) / labels,
            "token_accuracy": 100 * float(self.totals.num_correct) / labels,
        }

    def _raise_stopped(self, reason: str) -> None:
        raise Stopped(reason, optimizer_step=self.optimizer_step)

    def _checkpoint(self, validated: bool) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        assert not any(g is not None for g in gradients), "half an optimiser step would be lost"
        self.random_states.collect(self.state_before_validation or random_state())
        key = f"valid_{self.task.metric}"
        meta = {"optimizer_step": self.optimizer_step} | (
            {key: self.valid_value} if validated else {}
        )
        higher = self.task.higher_is_better
        self.checkpointer.save_and_prune(meta, None if higher else key, key if higher else None)

    # ------------------------------------------------------------ validation

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Empty the collected hypotheses."""
        self.state_before_validation = random_state()
        self.hypotheses: list[Hypothesis] = []
        self.valid_sums = torch.zeros(2, device=self.device)

    def _fit_valid(self, valid_set: Any, epoch: int, enable: bool) -> None:
        try:
            super()._fit_valid(InStep(valid_set), epoch, enable)
        except Stopped as reason:
            self.step = 0
            self._checkpoint(validated=False)
            self._raise_stopped(str(reason))

    def evaluate_batch(self, batch: Batch, stage: sb.Stage) -> Tensor:
        """Teacher-forced loss and greedy transcripts of one validation batch."""
        batch = batch.to(self.device)
        try:
            with torch.no_grad():
                sums = self.model(batch)
                self.hypotheses += decode_batch(self.model, batch)
        except torch.OutOfMemoryError as error:
            keys = "eval_batch_size or eval_batch_positions"
            raise memory_fault(error, self.model, batch, keys) from None
        self.valid_sums += torch.stack([sums.loss.float(), sums.num_labels.float()])
        return (sums.loss / sums.num_labels).cpu()

    def on_stage_end(self, stage: sb.Stage, stage_loss: Any, epoch: int | None = None) -> None:
        """After validation: score, log a line, save a checkpoint."""
        # Encoders draw random numbers in eval mode, too; how a run goes on must not depend on what was validated.
        assert self.state_before_validation is not None
        set_random_state(self.state_before_validation)
        self.state_before_validation = None
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
            }
            | ({"skipped_steps": seen["skipped_steps"]} if seen["skipped_steps"] else {}),
            train_stats=self.train_stats() if self.totals.num_labels else None,
            valid_stats={
                "loss": float(self.valid_sums[0] / self.valid_sums[1]),
                self.task.metric: self.valid_value,
            },
        )
        self.counters.validated_step = self.optimizer_step
        self._checkpoint(validated=True)
