"""The training loop, written out: one file from prepared rows to a measured checkpoint."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from scalerec import checkpoint, evaluate
from scalerec.batch import Batch
from scalerec.config import parse, paths
from scalerec.data.loader import Loader, Position
from scalerec.data.reader import ParquetRows, check_parts, count_parts
from scalerec.data.split import Part
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.hardware import keep_freed_memory
from scalerec.losses import total
from scalerec.models.base import Model
from scalerec.results import from_json, to_json
from scalerec.schema import Schema
from scalerec.training.generators import generator_states, restore_generators
from scalerec.training.log import Log
from scalerec.training.optim import load_state_tensors, set_rates, state_tensors
from scalerec.training.run import Run
from scalerec.training.warm_start import transfer

FLOPS_SAMPLE = 4096  # rows
LOCK = ".lock"  # in the folder of a run: held by who trains into it


@dataclass
class State:
    """Where a run stands; together with the tensors of a checkpoint it is all that going on needs."""

    step: int = 0
    epoch: int = 0
    position: Position = field(default_factory=Position)
    losses: dict[str, float] = field(default_factory=dict)  # summed since the last logged step
    steps_in_losses: int = 0
    best: str = ""  # checkpoint
    best_value: float | None = None
    best_tables: dict[str, dict[str, float]] = field(default_factory=dict)  # of the validation rows, by task
    evaluations: int = 0
    evaluated: int = -1  # step of the last evaluation
    evaluations_since_best: int = 0
    threads: int = 0
    rows: int = 0  # in all the files
    seconds: float = 0.0
    finished: bool = False


class Training:
    """One run in one folder."""

    def __init__(self, run: Run, out: Path, *, resume: bool = False, warm_start: Path | None = None, log: Log):
        run = run.model_copy(update={"data": run.data.settled(log.say)})
        self.run, self.out, self.log = run, out, log
        self.config = run.training
        threads = self.config.threads or torch.get_num_threads()
        earlier = self._earlier(resume, threads)
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":  # or two threads add up a gradient in whichever order they come
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

        prepared = run.data.prepare(log.say)
        self.rows = ParquetRows.of(run.data, prepared, skip_bad_shards=run.skip_bad_shards)
        schema = run.schema()
        if earlier is not None:
            self._same_data(earlier, schema)
        self.parts = count_parts(self.rows, schema)
        check_parts(self.parts, schema, run.model.ranks)
        self.steps = self.config.epochs * -(-self.parts["train"].rows // self.config.batch_size)
        self.state = State(threads=threads, rows=self.rows.num_rows)
        if earlier is None:
            old = checkpoint.load(warm_start) if warm_start else None
            if old is not None and old.encoder.schema != schema:
                raise InputError(f"--warm-start {warm_start}: that checkpoint is of another schema")
            log.say(f"fitting the encoder on {self.parts['train'].rows:,} rows")
            training_rows = self.rows.batches("train", schema.input_columns())
            self.encoder = old.encoder.grown(training_rows) if old else Encoder.fit(schema, training_rows)
        else:
            old = None
            self.encoder = earlier.encoder
        torch.manual_seed(self.config.seed)
        self.model: Model = run.model.build(self.encoder.layout).to(self.device)
        if old is not None:
            log.say(transfer(old, self.model))
        if self.config.precision == "bf16" and self.device.type == "cpu":  # elsewhere torch's optimisers want float32
            self.model.begin_bf16()
        self.optimizers = self.config.optimizer.build(self.model)
        self.loader = Loader(
            self.rows, self.encoder, "train", self.config.batch_size, seed=self.config.seed,
            window_rows=self.config.window_rows, transforms=(self.config.stochastic_length, self.config.negatives),
        )  # fmt: skip
        if earlier is not None:
            self._restore(earlier)
        else:
            self._save()

    # -- beginnings

    def _earlier(self, resume: bool, threads: int) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from; InputError when there is none, or when the run is not the same."""
        found = checkpoint.saved(self.out)
        if not resume:
            if found:
                raise InputError(f"{self.out} already holds a run: pass --resume to go on, or another --out")
            return None
        if not found:
            raise InputError(f"--resume: no checkpoint in {self.out}; start the run without --resume")
        earlier = checkpoint.load(found[-1])
        check_same(earlier, self.run, self.out)
        used = earlier.state()["threads"]
        if used != threads:
            raise InputError(
                f"--resume: {self.out} was trained with {used} threads, now there are {threads}, which changes the "
                f"last bits: run with --training.threads {used} from the start, or OMP_NUM_THREADS={used}"
            )
        return earlier

    def _same_data(self, earlier: checkpoint.Checkpoint, schema: Schema) -> None:
        if earlier.encoder.schema != schema:
            raise InputError(f"--resume: the schema has changed since {self.out} was started; use another --out")
        before = earlier.state()["rows"]
        if before != self.rows.num_rows:
            raise InputError(
                f"--resume: the files held {before:,} rows when {self.out} was started and hold {self.rows.num_rows:,} "
                f"now; start another run with --warm-start {self.out}"
            )

    def _restore(self, earlier: checkpoint.Checkpoint) -> None:
        self.model.load_state_dict(earlier.weights)
        tensors, state = earlier.state_tensors(), earlier.state()
        restore_generators(tensors, self.device)
        load_state_tensors(self.optimizers, tensors)
        self.state = State(**{**state, "position": Position(*state["position"])})
        self._point_to_best()
        self.log.rewind(self.state.step, evaluated=self.state.evaluated == self.state.step)
        self.log.say(f"resuming {self.run.name} from step {self.state.step}")

    # -- the loop

    def fit(self) -> None:
        """Train to the end; every kill in between is made good by the next call with `resume`."""
        began = time.monotonic() - self.state.seconds
        while not self.state.finished and self.state.epoch < self.config.epochs:
            self.model.train()
            for batch, position in self.loader.epoch(self.state.epoch, self.state.position):
                set_rates(self.optimizers.values(), self.config.optimizer.factor(self.state.step / self.steps))
                losses = self.step(batch.to(self.device))
                self.state.step += 1
                self.state.position = position
                self.state.seconds = time.monotonic() - began
                self._note(losses, len(batch))
                if self.config.evaluate_every and self.state.step % self.config.evaluate_every == 0:
                    self._evaluate()
                    if self.state.finished:
                        break
                elif self.state.step % self.config.save_every == 0:
                    self._save()
            else:
                self.state.epoch, self.state.position = self.state.epoch + 1, Position()
                self.log.counts(self.loader.counts + self.rows.counts if self.state.epoch == 1 else Counter())
                if not self.config.evaluate_every:
                    self._evaluate()
        if self.state.evaluated != self.state.step:
            self._evaluate()
        self.state.seconds = time.monotonic() - began  # the last validation is part of training, as those before it
        self.state.finished = True

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; the loss of each term."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            terms = self.model.objective(batch)
        loss = total(terms)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.model.after_step()
        found = {"loss": loss, **{name: term.sum / term.weight.clamp(min=1e-12) for name, term in terms.items()}}
        return {name: value.item() for name, value in found.items()}

    def _note(self, losses: dict[str, float], rows: int) -> None:
        state = self.state
        if losses["loss"] != losses["loss"]:
            raise InputError(f"the loss is NaN at step {state.step}: lower --training.optimizer.lr")
        for name, value in losses.items():
            state.losses[name] = state.losses.get(name, 0.0) + value
        state.steps_in_losses += 1
        self.log.progress(state.epoch, self.config.epochs, rows, self.parts["train"].rows, losses["loss"])
        if state.step % self.config.log_every == 0:
            means = {name: value / state.steps_in_losses for name, value in state.losses.items()}
            values = {"epoch": state.epoch, **means, **self.model.diagnostics()}
            self.log.write("train", state.step, values, state.seconds)
            state.losses, state.steps_in_losses = {}, 0

    def _evaluate(self) -> None:
        """Validate, keep the best checkpoint, and stop when nothing got better for `patience` evaluations."""
        state = self.state
        found = evaluate.tables(self.predict("validation"), self.encoder.layout.tasks)
        state.evaluations, state.evaluated = state.evaluations + 1, state.step
        value = self._value(found)
        self.log.write("validation", state.step, {"epoch": state.epoch, "tasks": found}, state.seconds)
        if state.best_value is None or value > state.best_value:
            state.best, state.best_value, state.evaluations_since_best = self._name(), value, 0
            state.best_tables = found
        else:
            state.evaluations_since_best += 1
            state.finished = 0 < self.config.patience <= state.evaluations_since_best
        self._save()

    def _value(self, tables: dict[str, dict[str, float]]) -> float:
        """What early stopping looks at, larger is better."""
        select = self.config.select
        if select == "last":
            return float(self.state.step)
        values = [table[select] for table in tables.values() if select in table]
        values = [value for value in values if not math.isnan(value)]  # of a task with labels of one class only
        if not values:
            raise InputError(
                f"--training.select {select}: no task can be measured by it on the validation part, where all labels "
                "that count are of one class: move the cuts of --data.split, or select another"
            )
        return sum(values) / len(values) * (-1 if select == "log_loss" else 1)

    def predict(self, part: Part) -> evaluate.Predictions:
        """Scores of a part's rows, in their order, by the model as it stands."""
        self.model.eval()
        loader = Loader(self.rows, self.encoder, part, evaluate.BATCH)
        found = evaluate.predict(self.model, (batch.to(self.device) for batch in loader))
        self.model.train()
        return found

    # -- keeping

    def _name(self) -> str:
        # One step can be kept twice, before and after it was evaluated: a folder that is there is never written again.
        return f"step-{self.state.step:09d}-{self.state.evaluations:04d}"

    def _save(self) -> None:
        folder = self.out / "checkpoints" / self._name()
        tensors = {**state_tensors(self.optimizers), **generator_states(self.device)}
        run = self.run.model_dump(mode="json")
        layout = self.encoder.layout
        checkpoint.save(folder, run, self.encoder, layout, self.model.state_dict(), tensors, asdict(self.state))
        self._point_to_best()
        for old in folder.parent.iterdir():  # those too that a killed process had not quite removed
            if old.name not in (self._name(), self.state.best):
                shutil.rmtree(old)

    def _point_to_best(self) -> None:
        if self.state.best:
            best = {"checkpoint": self.state.best, self.config.select: self.state.best_value}
            checkpoint.write_atomically(self.out / "best.json", to_json(best))


def check_same(earlier: checkpoint.Checkpoint, run: Run, out: Path) -> None:
    """InputError naming the first option in which `run` differs from the one that was kept in `out`."""
    before = paths(parse(Run, earlier.run, str(earlier.folder)))
    for path, value in paths(run).items():
        if before.get(path) != value:
            grown = " (a log that has grown is for --warm-start)" if ".split." in path else ""
            raise InputError(
                f"{out} was started with --{path} {before.get(path)}, now it is {value}: use the same options or "
                f"another --out{grown}"
            )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """InputError while another process trains into `out`: two would write over each other's checkpoints."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} is no folder and cannot become one: {error.strerror}: pass another --out") from None
    try:
        with FileLock(out / LOCK, blocking=False):
            yield
    except Timeout:
        raise InputError(f"another process trains into {out}: stop it first, or pass another --out") from None


def train(run: Run, out: Path, *, resume: bool = False, warm_start: Path | None = None, quiet: bool = False) -> dict:
    """Train `run` into `out` and measure its best checkpoint on the validation and test rows.

    Returns what `out/metrics.json` holds. Also written: `test.parquet` (scores of the test rows), `log.jsonl`,
    checkpoints, TensorBoard events if asked for.

    Raises:
        InputError: bad options, bad data, a full disk, another process at work in `out`; the last good checkpoint
            survives.
    """
    done = out / "metrics.json"
    if resume and done.exists():
        check_same(checkpoint.load(out), run, out)
        return from_json(done.read_text())
    with alone(out), Log(out, quiet=quiet, tensorboard=run.training.tensorboard) as log:
        training = Training(run, out, resume=resume, warm_start=warm_start, log=log)
        training.fit()
        training.model.load_state_dict(checkpoint.load(out).weights)
        state, tasks = training.state, training.encoder.layout.tasks
        predictions = training.predict("test")
        evaluate.write(predictions, tasks, out / "test.parquet")
        found: dict[str, Any] = {"name": run.name, "seconds": state.seconds, "steps": state.step}
        found |= {"validation": state.best_tables, "test": evaluate.tables(predictions, tasks)}
        found["parameters"] = {**training.model.parts(), "embedding": training.encoder.layout.embedding_parameters}
        sample = next(iter(Loader(training.rows, training.encoder, "test", FLOPS_SAMPLE)))
        found["flops_per_row"] = training.model.flops(sample) / len(sample)
        checkpoint.write_atomically(done, to_json(found, indent=1))
    return found
