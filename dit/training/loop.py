"""The training loop: steps, checkpoints, metrics, and the record at the end."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ditscale.dit.checkpoint import MetricsLog, remove_later
from ditscale.dit.data import ImageStream
from ditscale.dit.files import file_sha256, folder_lock, remove_unfinished
from ditscale.dit.rundata import RunData
from ditscale.dit.training.averages import keep_averages
from ditscale.dit.training.batches import Feeder, open_stream, validation_set
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.evaluation import draw_pictures, validation_losses
from ditscale.dit.training.execution import Execution
from ditscale.dit.training.folder import WEIGHTS, claim, clear, settle
from ditscale.dit.training.ranks import Ranks, started
from ditscale.dit.training.record import RunRecord, describe, validation_name
from ditscale.dit.training.sinks import Sink, open_sink, sink_module
from ditscale.dit.training.state import TrainState
from ditscale.dit.training.step import Stepper
from ditscale.dit.update import whole
from ditscale.dit.weights import save_weights
from ditscale.errors import InputError
from ditscale.memory import keep_memory

# The smoothing of the training loss in the metrics, as the decay of an exponential average over images.
_SMOOTHING_IMAGES = 1024.0
# Skipped steps in a row after which a run is given up: its weights are what makes the losses infinite.
_MOST_SKIPS = 20
# Lines of metrics in a whole run, about.
_LINES = 200


class Stopped(Exception):
    """Training was asked to stop and did.

    Attributes:
        saved: whether a checkpoint of its last step could be written; if not, the run goes on from the one before.
    """

    def __init__(self, where: str, saved: bool) -> None:
        super().__init__(where if saved else f"{where}, of which no checkpoint could be written")
        self.saved = saved


class Listeners(NamedTuple):
    """Whom a run tells, and whom it asks; see :func:`train`."""

    progress: Callable[[int, int, float], None] | None
    should_stop: Callable[[], bool] | None
    say: Callable[[str], None]


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    execution: Execution | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Train, or go on training, or hand back the record of a run that is done.

    Called by each of several processes that torchrun started, they train one model together. On a CPU the C library is
    told to keep freed memory from then on (:func:`ditscale.memory.keep_memory`).

    Args:
        config: what to train.
        out: the run's folder; holds config.json, metrics.jsonl, checkpoints while it trains, and at the end
            ``weights.safetensors`` (averaged weights) and ``run.json``, the record. Default: ``runs/<run id>``.
        execution: how. Default: ``Execution()``.
        progress: called after each step with (steps done, steps, smoothed training loss), by the first process.
            Default: None.
        should_stop: asked in each step; where a process's says yes, a checkpoint is written and Stopped raised. Default:
            None.
        say: takes sentences that a person should see, such as a damaged checkpoint. Default: stderr.
        extra: more fields for the record, such as a study's budget. Default: None.

    Returns:
        The run record, flat: what was trained, on what, with how many FLOPs, and the losses.

    Raises:
        InputError: the folder holds another run, or is in use, or cannot be written.
        Stopped: ``should_stop`` said so; the same call goes on from the last checkpoint.
    """
    execution = execution or Execution()
    folder = Path("runs") / config.run_id if out is None else Path(out)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(started(execution))
        if ranks.device.type == "cpu":
            keep_memory()  # for as long as the process lives
        speak = say or _to_stderr
        listeners = Listeners(
            progress if ranks.first else None, should_stop, speak if ranks.first else lambda sentence: None
        )
        _need_even_shares(config, execution, ranks)

        def take() -> RunRecord | None:
            if not (folder / "run.json").exists():
                for name in execution.sinks:
                    sink_module(name)  # one that is missing is said before the folder is this run's
            stack.enter_context(folder_lock(folder))
            new = not (folder / "config.json").exists()
            record = claim(folder, config, speak)
            remove_unfinished(folder)
            if new:
                stack.push(release)
            return record

        def release(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
            """A run that failed before its first step, whatever the fault, leaves its folder to the corrected one."""
            if error is not None and (run is None or not run.state.step):
                clear(folder)

        run: _Run | None = None
        record = ranks.on_first(take)
        if record is None:
            run = _Run(config, execution, ranks, folder, listeners)
            record = run.train()
            record |= dict(extra or {})  # type: ignore[typeddict-item]
            ranks.on_first(lambda: settle(folder, record))
        return record


def _to_stderr(sentence: str) -> None:
    """Say it to whom stderr reaches. Often that is a log on the disk that is full, which is what is said: no reason to stop."""
    with contextlib.suppress(OSError):
        print(f"ditscale: {sentence}", file=sys.stderr)


def _need_even_shares(config: TrainConfig, execution: Execution, ranks: Ranks) -> None:
    if config.batch % ranks.count:
        raise InputError(f"batch: expected a multiple of {ranks.count} processes, got {config.batch}")
    share, micro = config.batch // ranks.count, execution.microbatch
    if micro is not None and share % micro:
        raise InputError(
            f"execution.microbatch: expected a divisor of {share}, a process's share of batch {config.batch}, got {micro}"
        )


def _decoder(config: TrainConfig, execution: Execution, stream: ImageStream) -> Callable[[Tensor], Tensor] | None:
    """What makes pictures of a model's samples; None where none are drawn."""
    if not execution.sample_every:
        return None
    channels, data = config.model.in_channels, RunData.of(stream)
    if config.model.latent_factor == 1:
        if channels != 3:
            raise InputError(f"execution.sample_every: expected 0 where there are no pictures, got {channels} channels")
        return data.unscaled
    if execution.vae is None:
        raise InputError("execution.vae: expected an autoencoder's folder to draw a model of latents, got none")
    from ditscale.dit.encoding import Autoencoder

    autoencoder = Autoencoder.load(execution.vae)
    autoencoder.check_model(config.model)
    return lambda latents: autoencoder.decode(data.unscaled(latents.cpu()))


class _Run:
    """One run between its configuration and its record."""

    def __init__(
        self, config: TrainConfig, execution: Execution, ranks: Ranks, folder: Path, listeners: Listeners
    ) -> None:
        self.config, self.execution, self.ranks, self.folder = config, execution, ranks, folder
        self.listeners = listeners
        self.stream = open_stream(config, "train")
        self.decode = _decoder(config, execution, self.stream)
        self.validation = validation_set(config)  # now: what is wrong with it is said before training, not after
        self.state = TrainState(config, execution, ranks)
        found, complaints = self.state.restore(folder)
        ranks.on_first(lambda: remove_later(folder, found))
        for complaint in complaints:
            listeners.say(f"{complaint}; it is removed")
        self.feed = Feeder(config, self.stream, ranks, workers=execution.data_workers, first_step=self.state.step)
        self.stepper = Stepper(
            self.state.model,
            config.flow,
            self.state.updater,
            called=self.state.called,
            accumulating=lambda: ranks.local_gradients(self.state.called, self.state.model),
            precision=config.precision,
            microbatch=execution.microbatch,
            balance_weight=config.balance_weight,
        )
        self.log: MetricsLog | None = None
        self.sinks: dict[str, Sink] = {}
        self.complaints: set[str] = set()
        self.saved_at = self.clock = time.perf_counter()
        self.save_failed = False

    def train(self) -> RunRecord:
        """Train to the end, and judge."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.feed.close)
            self.ranks.on_first(lambda: self._open_logs(stack))
            self.saved_at = self.clock = time.perf_counter()
            return self._judge(self._loop())

    def _open_logs(self, stack: contextlib.ExitStack) -> None:
        data = RunData.of(self.stream)
        if self.state.step and (trained := RunData.read(self.folder)) is not None:
            trained.check(data, str(RunData.path(self.folder)))
        data.write(self.folder)
        self.log = MetricsLog(self.folder / "metrics.jsonl", keep_to_step=self.state.step, say=self.listeners.say)
        stack.callback(self.log.close)
        stack.callback(self._tell_sinks, lambda sink: sink.close())
        for name in dict.fromkeys(self.execution.sinks):
            self.sinks[name] = open_sink(name, self.folder, self.config, self.state.step)

    def _loop(self) -> str:
        config, state = self.config, self.state
        schedule = config.schedule
        steps = config.steps
        while state.step < steps:
            began = time.perf_counter()
            rate = schedule.factor(state.step)
            loss, norm = self.stepper.gradients(self.feed(state.step))
            loss, stop, save = self._agree(loss)
            size = float(norm)
            if math.isfinite(loss) and math.isfinite(size):
                state.updater.apply(norm, rate)
                weight = 1 - math.exp(-config.batch / _SMOOTHING_IMAGES)
                state.smoothed = (
                    loss if math.isnan(state.smoothed) else state.smoothed + weight * (loss - state.smoothed)
                )
                state.skipped = 0
            else:
                state.skipped += 1
                if not self._tolerate(loss, size):
                    return "diverged"
            state.step += 1
            state.meter.step(config.batch, time.perf_counter() - began)
            self._tell(rate, size)
            if state.step < steps and (stop or save):
                saved = self._save()
                if stop:
                    raise Stopped(f"{self.folder.name} at step {state.step} of {steps}", saved)
        self._count_time()
        return "finished"

    def _agree(self, loss: float) -> tuple[float, bool, bool]:
        """The mean loss of all ranks; whether one wants to stop; whether the first wants a checkpoint."""
        should_stop = self.listeners.should_stop
        stop = should_stop is not None and should_stop()
        save = time.perf_counter() - self.saved_at > self.execution.checkpoint_seconds
        if self.ranks.count == 1:
            return loss, stop, save
        total, stops, saves = self.ranks.sum([loss, float(stop), float(save and self.ranks.first)])
        return total / self.ranks.count, stops > 0, saves > 0

    def _tolerate(self, loss: float, norm: float) -> bool:
        """Say what is wrong with this step, and whether the run goes on without it."""
        config, step = self.config, self.state.step
        first = step * config.batch
        event = {"step": step, "first_image": first, "images": config.batch, "seed": config.seed}
        goes_on = config.on_nonfinite == "skip" and self.state.skipped <= _MOST_SKIPS
        self.listeners.say(
            f"{self.folder.name}: loss {loss}, gradient norm {norm} in step {step}, images {first} to "
            f"{first + config.batch - 1}, seed {config.seed}; {'skipped' if goes_on else 'stopped before its update'}"
        )
        if not goes_on:
            # The weights are still those that this step began with: the checkpoint shows it again, and so without it.
            self._save()
        self.state.nonfinite.append(event | {"loss": str(loss), "gradient_norm": str(norm)})
        return goes_on

    def _tell(self, rate: float, norm: float) -> None:
        """Metrics, pictures and progress after a step."""
        config, execution, state = self.config, self.execution, self.state
        step, steps = state.step, config.steps
        row: dict[str, Any] = {}
        if execution.validate_every and step % execution.validate_every == 0 and step < steps:
            by_time = validation_losses(config, state, self.validation)
            row = {"loss": math.fsum(by_time) / len(by_time), "loss_by_timestep": by_time}
        if row or step % max(1, steps // _LINES) == 0 or step == steps:
            meter = state.meter
            row = {
                "step": step,
                "images": step * config.batch,
                "flops": meter.model_flops,
                "train_loss": state.smoothed,
                "lr": config.lr * rate,
                "gradient_norm": norm,
                "seconds": state.seconds + time.perf_counter() - self.clock,
                "mfu": meter.mfu,
            } | row
            if self.log is not None:
                self.log.append({name: _json_number(value) for name, value in row.items()})
            numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            self._tell_sinks(lambda sink: sink.log(step, numbers))
        if execution.sample_every and step % execution.sample_every == 0:
            self._draw()
        keep_averages(config, state, self.folder, self._complain)
        if self.listeners.progress is not None:
            self.listeners.progress(step, steps, state.smoothed)

    def _draw(self) -> None:
        """Pictures of this step; a run goes on without those that cannot be drawn or written."""
        step = self.state.step
        path = self.folder / "samples" / f"step-{step:09d}.png"
        with contextlib.suppress(OSError):  # said when the picture is written, after what all ranks do together
            path.parent.mkdir(exist_ok=True)
        try:
            draw_pictures(self.config, self.state, self.validation, path, RunData.of(self.stream), self.decode)
        except (InputError, OSError) as error:
            self._complain("picture not drawn", error)
        else:
            self._tell_sinks(lambda sink: sink.picture(step, path))

    def _tell_sinks(self, tell: Callable[[Sink], None]) -> None:
        """Tell every sink; metrics.jsonl has what one that fails has not."""
        for name, sink in self.sinks.items():
            try:
                tell(sink)
            except Exception as error:  # whatever a service's package raises
                self._complain(f"{name} not told", error)

    def _complain(self, what: str, error: Exception) -> None:
        """Say, the first time, what could not be done beside the training."""
        if what not in self.complaints:
            self.complaints.add(what)
            self.listeners.say(f"{what} ({error or type(error).__name__}); training goes on")

    def _save(self) -> bool:
        """Write a checkpoint; where that is not possible, say so and go on: the ones before it are whole.

        Returns:
            Whether it is written.
        """
        self._count_time()
        try:
            self.state.save(self.folder)
            self.save_failed = False
        except InputError as error:
            if not self.save_failed:
                goes_on = "; training goes on" if self.state.step < self.config.steps else ""
                self.listeners.say(f"no checkpoint at step {self.state.step} ({error}){goes_on}")
            self.save_failed = True
        self.saved_at = time.perf_counter()
        return not self.save_failed

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now

    def _judge(self, status: str) -> RunRecord:
        """The record; of a finished run also the validation loss of the averaged weights, which are written."""
        config, state = self.config, self.state
        if status == "finished":
            self._save()  # what fails from here on costs no training
        # By the first alone, as it reads all data once to name them by their content.
        record = self.ranks.on_first(lambda: describe(config, self.execution, self.ranks, state, self.stream, status))
        record["evaluation"] = validation_name(self.validation)
        if status != "finished":
            return record
        by_time = validation_losses(config, state, self.validation)
        times = [float(t) for t in self.validation.times]
        record["timesteps"] = times
        for loss, t in zip(by_time, times, strict=True):
            if not math.isfinite(loss):
                record["status"], record["reason"] = "diverged", f"validation loss {loss} at time {t:g}"
                self.listeners.say(f"{self.folder.name}: {record['reason']}")
                return record
        record["loss"] = math.fsum(by_time) / len(by_time)
        record["loss_by_timestep"] = by_time
        averaged = state.updater.shared(state.updater.averages[0].weights)
        tensors = {name: whole(t).cpu() for name, t in averaged.items()}
        record["weights_sha256"] = self.ranks.on_first(lambda: self._write_weights(tensors))
        return record

    def _write_weights(self, tensors: Mapping[str, Tensor]) -> str:
        path = self.folder / WEIGHTS
        save_weights(path, tensors, self.config.model, self.config.flow)
        return file_sha256(path)


def _json_number(value: Any) -> Any:
    """A value of the metrics, with None for NaN and infinity, which JSON has not."""
    if isinstance(value, list):
        return [_json_number(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
