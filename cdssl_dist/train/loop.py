"""The training loop of one rank: the same code under Ray, under a bare launcher and in tests."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cdssl_dist import __version__
from cdssl_dist.config import Config
from cdssl_dist.data.batch import widen
from cdssl_dist.data.dataset import BadBlockError, DataSet
from cdssl_dist.data.loader import Loader, Step
from cdssl_dist.data.subset import elements
from cdssl_dist.model.cost import flops_per_edge
from cdssl_dist.model.export import EncoderCard, write_encoder
from cdssl_dist.train import checkpoint
from cdssl_dist.train.checkpoint import Checkpoint, Progress, Retention
from cdssl_dist.train.deepspeed_json import EngineSettings
from cdssl_dist.train.engine import Engine, init_distributed
from cdssl_dist.train.evaluate import Validation, fitted_baseline, gathered
from cdssl_dist.train.guard import Guard, GuardStop
from cdssl_dist.train.ledger import Ledger, Rollback
from cdssl_dist.train.mirror import Mirror, restore
from cdssl_dist.train.perf import Meter
from cdssl_dist.train.runlog import NullRunLog, RunLog
from cdssl_dist.train.schedule import learning_rate
from cdssl_dist.train.setup import device_of, model_and_task, plan_of
from cdssl_dist.train.system import memory_errors
from cdssl_dist.train.together import on_all_ranks, on_rank_0, raise_together
from cdssl_dist.train.watch import watched_edges
from sharding.block import decode


def train(
    config: Config,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    echo: bool = True,
) -> bool:
    """Train, resuming from the newest checkpoint in the run folder if there is one.

    Rank, world size and rendezvous come from the environment (``RANK``, ``WORLD_SIZE``, …).

    Args:
        config: of the run.
        stop_requested: called once per step on every rank; if any returns True, all save and return.
        report: called on rank 0 with each line of metrics.
        echo: also print progress, which is always written to ``train.log``.

    Returns:
        True if the run is complete, False if it was stopped on request.

    Raises:
        GuardStop: if the guard stops the run.
        CheckpointError: if the run folder holds another run.
        DataSetError: if the copy of a checkpoint to resume from cannot be used.
        SetupError: if the requested device or kernels are not available.
        BadBlockError: if a block fails its checksum, unless such blocks are to be skipped, or too many do.
        OutOfMemory: if memory runs out; names the packs involved.
    """
    device = device_of(config)
    torch.set_num_threads(config.engine.threads)
    init_distributed(device)
    if mirror := config.checkpoint.mirror:
        on_rank_0(lambda: restore(mirror, Path(config.run)))
    trainer = Trainer(config, device, stop_requested, report, echo)
    trainer.resume()
    with memory_errors(trainer.where):
        trainer.run()
    return trainer.finish()


class Trainer:
    """One rank of a run: everything that a step needs, and what changes from step to step.

    Attributes:
        cursor: consumed steps.
        guard: judges the gradient norm of each step, on all ranks alike.
        stopping: whether any rank was asked to stop.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        stop_requested: Callable[[], bool],
        report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        echo: bool = True,
    ) -> None:
        self.config, self.device = config, device
        self.stop_requested, self.report, self.echo = stop_requested, report, echo
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = Path(config.run)
        self.checkpoints = self.folder / "checkpoints"

        self.data = DataSet(config.data_path, cache_gb=config.data.cache_gb)
        self.plan = plan_of(config, self.data)
        torch.manual_seed(config.model.seed)
        model, self.task = on_all_ranks(lambda: model_and_task(config, device, self.data.manifest.cutoff))
        every_block, bad_blocks = replace(self.plan, last="pad"), config.data.bad_blocks
        packs = config.tracking.baseline_packs
        self.baseline = fitted_baseline(self.data, every_block, self.task, packs, device, bad_blocks)
        self.validation = Validation(
            self.data,
            self.task,
            self.baseline,
            blocks_per_pack=config.data.blocks_per_pack,
            packs_per_step=config.data.packs_per_step,
            packs=config.data.val_packs,
            device=device,
            bad_blocks=bad_blocks,
        )

        settings = EngineSettings(
            stage=config.engine.stage,
            precision=config.engine.precision,
            micro_steps=self.plan.micro_steps(self.world_size),
            extra=config.engine.deepspeed,
            **config.optim.model_dump(exclude={"lr"}),
        )
        self.engine = Engine(model, settings, device, self._decide)
        self.meter = Meter(device, config.engine.precision, flops_per_edge(config.graph.centers, **config.model.sizes))

        self.cursor = 0
        self.ledger = Ledger.read(self.folder)
        self.guard = Guard(config.guard)
        self.stopping = False
        self.lr = 0.0
        self.metrics: dict[str, float] = {}  # of the last validation
        self.validated = -1  # cursor at that validation
        self.log: RunLog | NullRunLog = NullRunLog()  # on rank 0 a ``RunLog``, once ``resume`` was called
        self.mirror: Mirror | None = None  # on rank 0, if checkpoints are copied
        # Of the current step, on this rank: loss, losses of its packs, bad blocks left out, and error from bad blocks.
        self.loss = torch.zeros((), device=device)
        self.pack_losses: list[torch.Tensor] = []
        self.skipped: tuple[int, ...] = ()
        self.error = ""

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        changes: list[str] = []
        if self.rank == 0:
            checkpoint.remove_leftovers(self.folder)
        if found := on_rank_0(lambda: checkpoint.newest(self.checkpoints, self.ledger)):
            self._forget_later_rollbacks(found.progress.cursor)
            changes = self._load(found)
        elif there := checkpoint.committed(self.checkpoints):
            raise checkpoint.CheckpointError(
                f"{self.checkpoints}: the guard rolled back over {', '.join(f.name for f in there)}, and nothing "
                "before is left to resume from; start over in another run folder, perhaps with a lower optim.lr"
            )
        else:
            self._forget_later_rollbacks(-1)
        ended = self.cursor >= self.config.schedule.steps
        if self.rank == 0:
            self.log = RunLog(self.folder, self.cursor, self.echo, self.report, ended)
        if found:
            self.log.say(f"resumed from step {self.cursor} on {self.world_size} ranks")
            for change in changes:
                self.log.event(self.cursor, "changed", what=change)
        for line in self.plan.about(self.world_size):
            self.log.say(line)
        engine = self.config.engine
        way = "Triton kernels" if engine.kernels == "triton" else "compiled torch" if engine.compile else "torch"
        self.log.say(f"on {self.device}, {engine.precision}, ZeRO {engine.stage}; edges go through {way}")
        mirror = self.config.checkpoint.mirror
        if self.rank == 0 and mirror:
            self.mirror = Mirror(mirror, self.folder, lambda kind, what: self.log.event(self.cursor, kind, what=what))
            if found:
                self.mirror.copy(found.folder)

    def run(self) -> None:
        """Train until the end, a stop request or a stop by the guard; a roll-back restarts the loader."""
        while self.cursor < self.config.schedule.steps and not self.stopping:
            with self._loader() as steps:
                for step in self.meter.timed(steps):
                    sums = self._step(step)
                    self.cursor = step.number + 1
                    if self.guard.last.verdict != "apply":
                        self._tell(step)
                    if self.guard.last.verdict == "stop":
                        raise GuardStop(f"step {step.number}: {self.guard.last.reason}")
                    if self.guard.last.verdict == "rollback":
                        self._roll_back()
                        break
                    self._after(sums)
                    if self.stopping:
                        break

    def finish(self) -> bool:
        """Export the encoder if the run is complete; return whether it is."""
        complete = self.cursor >= self.config.schedule.steps  # even if a stop was requested at the last step
        if complete and self.validated != self.cursor:  # a finished run, started again; or a roll-back at its end
            self._validate()
        weights = self.engine.weights() if complete else {}
        if complete and self.rank == 0:
            write_encoder(self.folder, weights, self._card())
        if self.mirror and not self.mirror.close(self.config.checkpoint.mirror_wait):
            self.log.say("the last checkpoint has not been copied yet; the next start will do so")
        self._status("done" if complete else "stopped", self.metrics)
        self.log.close()
        dist.barrier()
        return complete

    def where(self) -> str:
        """Describe the current step of this rank and its packs, for error reports."""
        table, lanes = self.plan.table, self.plan.lanes(self.rank, self.world_size)
        packs = [[e.index for e in self.plan.pack(self.cursor, lane)] for lane in lanes]
        said = (f"blocks {table.block[p].tolist()} with {table.edges[p].sum()} scored edges" for p in packs if p)
        return f"step {self.cursor} on rank {self.rank} of {self.world_size}, pack of " + ", or of ".join(said)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, step: Step) -> torch.Tensor | None:
        """Forward and backward over this rank's packs; returns the sums behind the metrics when they are due."""
        due = (step.number + 1) % self.config.tracking.every == 0
        sums = torch.zeros(len(self.task.sums), dtype=torch.float64, device=self.device) if due else None
        # Hooks would make compiled code recompile, and kernels do not call them.
        plain = not self.config.engine.compile and self.config.engine.kernels == "torch"
        if watched := self._look_is_due(step.number):
            self.engine.watch()
        edges = torch.zeros(3, dtype=torch.float64, device=self.device)
        # DeepSpeed divides by micro-steps and averages over ranks; the loss is per scored edge of the whole step.
        scale = self.world_size * len(step.packs) / max(step.edges, 1)
        self.loss, self.pack_losses, self.skipped = torch.zeros((), device=self.device), [], step.skipped
        self.error = step.error
        for raw in step.packs:
            batch = widen(raw.to(self.device))
            baseline = self.baseline if due else None
            with watched_edges(self.engine.computing, edges) if watched and plain else contextlib.nullcontext():
                squared, figures = self.task.loss(self.engine.module, batch, baseline)
            if sums is not None and figures is not None:
                sums += figures
            self.pack_losses.append(squared.detach() / max(step.edges, 1))
            self.loss += self.pack_losses[-1]
            self.engine.backward(squared * scale)
            self.meter.add(raw)
        if watched:
            self._report_watched(edges)
        return sums

    def _look_is_due(self, step: int) -> bool:
        every = self.config.tracking.watch_every
        return every > 0 and (step + 1) % every == 0

    def _report_watched(self, edges: torch.Tensor) -> None:
        """Write the metrics that are measured every ``watch_every`` steps; a collective."""
        dist.all_reduce(edges)
        found = self.engine.watched()
        messages, dead, saturated = (float(v) for v in edges)
        if messages:
            found |= {"watch/dead_edges": dead / messages, "watch/saturated_edges": saturated / messages}
        self.log.metrics(self.cursor + 1, found)

    def _decide(self, norm: float) -> float | None:
        """Judge a step, once on all ranks: return the learning rate to apply it with, or None to skip it."""
        # The norm is already reduced, so all ranks judge alike; the loss, stop requests and bad blocks are still local.
        found = [float(self.stop_requested()), float(len(self.skipped)), float(bool(self.error))]
        shared = torch.cat([self.loss[None], torch.tensor(found, device=self.device)])
        dist.all_reduce(shared)
        loss, asked, skipped, errors = shared.tolist()
        self.stopping = asked > 0
        if errors:
            raise_together(self.error)
        if skipped:
            self._tell_skipped(self.cursor, "train", gathered(self.skipped))
        applied = self.guard.state.applied
        rate = learning_rate(applied, peak=self.config.optim.lr, **self.config.schedule.model_dump())
        self.lr = rate * self.config.guard.rollback_lr ** len(self.ledger.rollbacks)
        self.guard.judge(norm, rollbacks=len(self.ledger.rollbacks), loss=loss)
        return self.lr if self.guard.last.verdict in ("apply", "clip") else None

    def _after(self, sums: torch.Tensor | None) -> None:
        """Do what is due after a consumed step: metrics, validation, checkpoint."""
        config = self.config
        if sums is not None:
            self._report(sums)
        if self.cursor % config.tracking.validate_every == 0 or self.cursor == config.schedule.steps:
            self._validate()
        if self.cursor % config.checkpoint.every == 0 or self.cursor == config.schedule.steps or self.stopping:
            c = config.checkpoint
            # A streak of bad steps may have begun already, and needs a checkpoint that was good before its first step.
            longest = max(config.guard.rollback_after, config.guard.level_after)
            retention = Retention(c.keep, c.quiet + longest, c.best, c.hours)
            folder = checkpoint.save(self.checkpoints, self.engine, self._progress(), retention, self.ledger)
            if self.mirror:
                self.mirror.copy(folder)
            self.log.event(self.cursor, "checkpoint")
            self.meter.restart()

    def _report(self, sums: torch.Tensor) -> None:
        """Write the training metrics of this step, over all ranks."""
        dist.all_reduce(sums)
        figures = {f"train/{name}": v for name, v in self.task.metrics(sums).items()}
        rates = self.meter.rates(len(self.plan.lanes(self.rank, self.world_size)) / self.plan.packs_per_step)
        guard = {"guard/norm": self.guard.norm, "guard/z": self.guard.last.z, "guard/verdict": self.guard.last.code}
        self.log.metrics(self.cursor, {**figures, **guard, **rates, "lr": self.lr})
        self._status("training", {**figures, **rates})
        self.log.say(
            f"step {self.cursor}/{self.config.schedule.steps}"
            f"  loss {figures['train/loss']:.4f}  skill {figures['train/skill']:+.3f}"
            f"  skill_edge {figures['train/skill_edge']:+.3f}  norm {self.guard.norm:.3g}"
            f"  {rates['perf/edges_s']:,.0f} edges/s"
            f"  {(self.config.schedule.steps - self.cursor) * self.meter.seconds_per_step:.0f} s left"
        )

    def _validate(self) -> None:
        with self.engine.averaged():
            found = self.validation.run(self.engine.module)
        self.metrics, self.validated = {f"val/{name}": v for name, v in found.items()}, self.cursor
        self.log.metrics(self.cursor, self.metrics)
        self.log.say(f"step {self.cursor}  " + "  ".join(f"{n} {v:.4f}" for n, v in self.metrics.items()))
        self._tell_skipped(self.cursor, "val", self.validation.skipped)
        self.meter.restart()

    def _tell_skipped(self, step: int, split: str, blocks: list[int]) -> None:
        """Log the bad blocks that a step or a validation left out, on any rank."""
        if blocks:
            self.log.event(step, "bad blocks", within=split == "train", split=split, blocks=blocks)

    def _tell(self, step: Step) -> None:
        """Log a verdict other than ``apply``, with the packs of the step; a collective."""
        last, losses = self.guard.last, self._losses_of_packs()
        if self.rank > 0:
            return
        packs = [[int(self.plan.table.block[e.index]) for e in pack] for pack in self.plan.step(step.number)]
        worst = max(range(len(packs)), key=lambda p: losses[p] if math.isfinite(losses[p]) else math.inf)
        about = {"norm": self.guard.norm, "z": last.z, "reason": last.reason, "packs": packs, "losses": losses}
        graphs: list[str] = []
        for block in packs[worst]:
            with contextlib.suppress(BadBlockError):  # also left out of the step
                graphs += decode(self.data.read(block)).keys
        self.log.event(step.number, last.verdict, within=True, **about, pack=worst, graphs=graphs)

    def _losses_of_packs(self) -> list[float]:
        """Return each pack's part of the step's loss, of which the largest marks the worst pack; a collective."""
        lanes = list(self.plan.lanes(self.rank, self.world_size))
        losses = torch.zeros(self.plan.packs_per_step, device=self.device)
        losses[lanes] = torch.stack(self.pack_losses[: len(lanes)])
        dist.all_reduce(losses)
        return [float(v) for v in losses]

    def _roll_back(self) -> None:
        """Restore the newest checkpoint from before the trouble, after writing the ledger; the data stream goes on."""
        before = self.cursor - self.guard.state.bad_in_row - self.config.checkpoint.quiet
        good = on_rank_0(lambda: checkpoint.newest(self.checkpoints, self.ledger, before))
        reason = self.guard.last.reason
        if good is None:
            raise GuardStop(f"{reason}; there is no good checkpoint to roll back to")
        self.ledger = self.ledger.with_rollback(Rollback(good.progress.cursor, self.cursor, reason))
        if self.rank == 0:
            self.ledger.write(self.folder)
        dist.barrier()
        self._load(good)

    # -- state --------------------------------------------------------------------------------------------------------

    def _load(self, found: Checkpoint) -> list[str]:
        """Load a checkpoint; return the allowed differences from the run that wrote it."""
        changes = checkpoint.check_fits(found, self.config, self.data.manifest.digest, self.data.counts)
        checkpoint.load(found, self.engine)
        self.guard.state = found.progress.guard
        self.cursor = self.ledger.resume_point(found.progress.cursor) or found.progress.cursor
        return changes

    def _forget_later_rollbacks(self, cursor: int) -> None:
        """Drop roll-backs of a continuation whose checkpoints were removed; a collective."""
        ledger = self.ledger.up_to(cursor)
        if ledger != self.ledger:
            self.ledger = ledger
            if self.rank == 0:
                ledger.write(self.folder)
            dist.barrier()

    def _progress(self) -> Progress:
        config = self.config
        return Progress(
            cursor=self.cursor,
            guard=self.guard.state,
            data_digest=self.data.manifest.digest,
            config_digest=config.digest(),
            config=config.model_dump(mode="json"),
            world_size=self.world_size,
            data=self.data.counts,
            loss=self.metrics["val/loss"] if self.validated == self.cursor else None,
            saved=time.time(),
        )

    def _loader(self) -> Loader:
        return Loader(
            self.data,
            self.plan,
            self.data.shape("train", self.plan.blocks_per_pack),
            rank=self.rank,
            world_size=self.world_size,
            first=self.cursor,
            end=self.config.schedule.steps,
            prefetch=self.config.data.prefetch,
            pin=self.device.type == "cuda",
            bad_blocks=self.config.data.bad_blocks,
            defer_errors=True,
        )

    def _status(self, state: str, figures: dict[str, float]) -> None:
        steps = self.config.schedule.steps
        self.log.status(state=state, step=self.cursor, steps=steps, world_size=self.world_size, **figures)

    def _card(self) -> EncoderCard:
        expansion = self.task.expansion
        return EncoderCard(
            cutoff=self.data.manifest.cutoff,
            centers=expansion.centers,
            end=expansion.end,
            gamma=expansion.gamma,
            model=self.config.model.sizes,
            sigma=self.task.sigma,
            precision=self.config.engine.precision,
            data_digest=self.data.manifest.digest,
            validation_digest=self.validation.digest(),
            config_digest=self.config.digest(),
            metrics=self.metrics,
            sources=self.data.manifest.sources,
            code_version=__version__,
            elements=elements(self.data, "train", self.plan.table.block),
            extra={"pretext": config} if (config := self.config.pretext.options) else {},
        )
