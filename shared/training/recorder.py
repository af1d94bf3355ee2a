"""The run directory and the metrics of a run. Every rank calls them; only rank 0 writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.checkpoint.directory import adapter_directory
from shared.checkpoint.directory.manifest import FileEntry
from shared.checkpoint.directory.publish import file_entries
from shared.checkpoint.directory.run_directory import RunDirectory, damage
from shared.checkpoint.files import files_below
from shared.console import log, quantity
from shared.families.registry import recorded_ignored
from shared.precision import DTYPES
from shared.report import metrics, page
from shared.report.metrics import Metrics, Rows, device_name, flops_per_token, peak_flops, peak_memory
from shared.report.track import Track
from shared.runtime.agreement import on_rank_0
from shared.training.balance import Balance, loss_over_micro_batch
from shared.training.best import Best
from shared.training.blend import Blend
from shared.training.config import TrainingConfig
from shared.training.fp8_update import Fp8Update
from shared.training.loss import Loss
from shared.training.options import EXTENDABLE
from shared.training.plan import Inputs
from shared.training.replies import Reply
from shared.training.report import render
from shared.training.run_hf_files import run_hf_files
from shared.training.samplers import Order

_LOGGED = 160  # characters of a reply


class SharedRunDirectory:
    """A run directory, opened by rank 0. Every rank writes its shards of an iteration."""

    def __init__(self, path: Path, resumed: int | None, directory: RunDirectory | None) -> None:
        self.path = path
        self.resumed = resumed  # iteration to resume from; None: a new run
        self.facts: dict[str, Any] = {}  # the manifest's, of that iteration
        self._directory = directory  # on rank 0
        self._committing: Future[None] | None = None  # on rank 0

    def begin(self, step: int) -> Path:
        """The partial directory of an iteration, the same on every rank."""
        return on_rank_0(lambda: self._rank0().begin(step))

    def commit(
        self, written: Path, step: int, *, facts: dict[str, Any], finished: bool, keep: int, protected: int | None
    ) -> None:
        """Publish the iteration in `written` after every rank has written its shards. Each rank hashes its share of the files."""
        torch.distributed.barrier()
        entries = self._entries(written, {})
        on_rank_0(
            lambda: self._rank0().commit(
                step, facts=facts, entries=entries, finished=finished, keep=keep, protected=protected
            )
        )

    def begin_commit(
        self,
        written: Path,
        step: int,
        *,
        facts: dict[str, Any],
        keep: int,
        protected: int | None,
        hashed: dict[str, FileEntry],
    ) -> None:
        """`commit` in a thread of rank 0, which waits for the disk. `finish_commit` when `committed` on every rank.

        `hashed`: files of this rank whose hashes are known.
        """
        entries = self._entries(written, _merged(_gathered(hashed)))
        if self._directory is not None:
            pool = ThreadPoolExecutor(1)
            commit = partial(self._directory.commit, step, facts=facts, entries=entries, keep=keep, protected=protected)
            self._committing = pool.submit(copy_context().run, commit)  # the thread knows the invocation
            pool.shutdown(wait=False)

    def committed(self) -> bool:
        """Whether the thread of `begin_commit` has ended; always on ranks without one."""
        return self._committing is None or self._committing.done()

    def finish_commit(self) -> None:
        """Raise the error of `begin_commit`, if there was one."""
        on_rank_0(lambda: None if self._committing is None else self._committing.result())
        self._committing = None

    def _entries(self, written: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
        """Sizes and hashes of all files of an iteration; each rank hashes its share of those that are not known."""
        names = on_rank_0(lambda: [path.relative_to(written).as_posix() for path in files_below(written)])
        unknown = [name for name in names if name not in known]
        return known | _merged(_gathered(file_entries(written, [written / name for name in _share(unknown)])))

    def check_resumed(self) -> None:
        """Compare the iteration to resume from with its hashes, each rank a share; go back to an older one if it is damaged.

        Raises:
            StageError: on rank 0: no intact iteration is kept.
        """
        while self.resumed is not None:
            entries = on_rank_0(lambda: self._rank0().recorded())
            found = _gathered(damage(self.path, {name: entries[name] for name in _share(sorted(entries))}))
            first = next((line for line in found if line), None)
            if first is None:
                self.facts = on_rank_0(lambda: self._rank0().facts)
                return
            self.resumed = on_rank_0(partial(self._fall_back, first))

    def _fall_back(self, damage: str) -> int:
        return self._rank0().fall_back(damage)

    def close(self) -> None:
        """Release the lock, after a commit that has begun."""
        if self._committing is not None:
            wait([self._committing])
        if self._directory is not None:
            self._directory.close()

    def _rank0(self) -> RunDirectory:
        assert self._directory is not None, "only rank 0 has the run directory open"
        return self._directory


def open_run(target: Path, inputs: Inputs, *, overwrite: bool, extend: bool = False) -> SharedRunDirectory:
    """Open a new or resumed run directory on rank 0; broadcast path and iteration. Arguments: `RunDirectory.open`."""
    directory: RunDirectory | None = None

    def begin() -> tuple[Path, int | None]:
        nonlocal directory
        directory = RunDirectory.open(
            target, kind="megatron", inputs=inputs.parents, overwrite=overwrite, extend=extend, extendable=EXTENDABLE
        )
        with run_hf_files(inputs) as files:
            directory.add_auxiliary_files(files)
        return directory.path, directory.iteration

    path, iteration = on_rank_0(begin)
    shared = SharedRunDirectory(path, iteration, directory)
    try:
        shared.check_resumed()
    except BaseException:
        shared.close()
        raise
    return shared


def samples_before(config: TrainingConfig, directory: SharedRunDirectory) -> int:
    """`consumed - step * global_batch_size` of a resumed run, in samples: 0 unless `--extend` changed the batch size."""
    consumed, step = directory.facts.get("consumed_tokens", 0) // config.sequence_length, directory.resumed or 0
    return consumed - step * config.global_batch_size


def _share(names: Sequence[str]) -> Sequence[str]:
    """This rank's share of files."""
    return names[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _gathered[T](value: T) -> list[T]:
    """Every rank's value."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _merged(shares: list[dict[str, FileEntry]]) -> dict[str, FileEntry]:
    return {name: entry for share in shares for name, entry in share.items()}


class Recorder:
    """Metrics of each update, to metrics.jsonl, trackers, the terminal and report.html. No-op except on rank 0."""

    def __init__(
        self,
        config: TrainingConfig,
        inputs: Inputs,
        directory: SharedRunDirectory,
        *,
        blend: Blend,
        order: Order,
        track: Sequence[Track],
        replies: bool = False,
    ) -> None:
        self._config, self._inputs, self._directory = config, inputs, directory
        self._blend, self._order = blend, order
        self._earlier = samples_before(config, directory)
        self._saved = directory.resumed
        self._flops = flops_per_token(
            inputs.architecture, config.sequence_length, mtp=config.mtp_loss_scaling_factor > 0
        )
        self._device = device_name()
        self._peak = peak_flops(self._device)
        self._metrics = (
            Metrics(directory.path, resumed_step=directory.resumed, track=track)
            if torch.distributed.get_rank() == 0
            else None
        )
        path = directory.path / metrics.REPLIES
        self._replies = (
            Rows(path, resumed_step=directory.resumed)
            if self._metrics is not None and (replies or path.exists())  # those after a resumed update are dropped
            else None
        )

    def holds(self, parts: Mapping[str, int]) -> None:
        """What this rank holds after an update, in bytes by kind."""
        log("memory      " + ", ".join(f"{quantity(size, 'bytes')} of {name}" for name, size in parts.items()))

    def updated(
        self,
        step: int,
        loss: Loss,
        rate: float,
        gradient_norm: float,
        seconds: float,
        balance: Balance | None = None,
        fp8: Fp8Update | None = None,
    ) -> None:
        """Record update `step`, counted from 1."""
        if self._metrics is None:
            return
        config = self._config
        speed = config.tokens_per_step / seconds
        logged = step % config.log_every == 0 or step == config.steps
        row = {
            "step": step,
            "loss": loss.mean,
            **({} if loss.mtp is None else {"mtp_loss": loss.mtp}),
            **(balance.row() if balance else {}),
            **(fp8.row(layers=logged) if fp8 else {}),
            "learning_rate": rate,
            "gradient_norm": gradient_norm,
            "targets": loss.targets,
            "samples": self._earlier + step * config.global_batch_size,
            "tokens": self._earlier * config.sequence_length + step * config.tokens_per_step,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(speed, 1),
            "memory_bytes": peak_memory(),
        }
        if self._peak is not None:
            row["mfu"] = round(speed * self._flops / (self._peak * config.parallel.processes), 4)
        self._metrics.append(**row)
        for line in fp8.fallbacks if fp8 else ():
            log(f"fp8         update {step}: {line}")
        if logged:
            recent = [row["seconds"] for row in self._metrics.rows[-50:] if "seconds" in row]
            mtp = "" if loss.mtp is None else f"  mtp {loss.mtp:.4f}"
            mfu = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
            experts = f"  {balance}" if balance else ""
            left = sum(recent) / len(recent) * (config.steps - step)
            log(
                f"update {step}/{config.steps}  loss {loss.mean:.4f}{mtp}{experts}  lr {rate:.2e}  grad {gradient_norm:.2f}  "
                f"{speed:,.0f} tokens/s{mfu}  {quantity(row['memory_bytes'], 'bytes')}  "
                f"epoch {row['samples'] / self._blend.epoch:.2f}  {_duration(left)} left"
            )

    def validated(self, step: int, result: Loss | None, bytes_per_token: float | None) -> None:
        """Record a validation after update `step`; `result` None: no validation split."""
        if self._metrics is None or result is None:
            return
        row: dict[str, float] = {"step": step, "validation_loss": result.mean, "validation_targets": result.targets}
        text = f"validation after update {step}: loss {result.mean:.4f}"
        if result.mtp is not None:
            row["validation_mtp_loss"] = result.mtp
            text += f", mtp {result.mtp:.4f}"
        if bytes_per_token is not None:
            row["bits_per_byte"] = metrics.bits_per_byte(result.mean, bytes_per_token)
            text += f", {row['bits_per_byte']:.4f} bits per byte"
        self._metrics.append(**row)
        log(text)

    def replied(self, step: int, replies: Sequence[Reply]) -> None:
        """Record replies to the prompts after update `step`, into replies.jsonl."""
        if self._replies is None:
            return
        for number, reply in enumerate(replies):
            self._replies.append(
                step=step, prompt=number, text=reply.prompt, reply=reply.text, tokens=reply.tokens, ended=reply.ended
            )
        first = replies[0].text if len(replies[0].text) <= _LOGGED else replies[0].text[:_LOGGED] + " ..."
        log(f"reply after update {step} to prompt 1 of {len(replies)}: {json.dumps(first, ensure_ascii=False)}")

    def saving(self) -> None:
        """fsync the metrics and write the report, before the checkpoint is written."""
        if self._metrics is not None:
            self._metrics.sync()
            if self._replies is not None:
                self._replies.sync()
            path = self._directory.path
            device = f"{self._config.parallel.processes} x {self._device}"
            replies = self._replies.rows if self._replies else ()
            report = render(self._metrics.rows, self._facts(), title=path.name, device=device, replies=replies)
            page.write(path / page.REPORT, report)

    def close(self) -> None:
        """End the record; trackers write what they hold."""
        for rows in (self._metrics, self._replies):
            if rows is not None:
                rows.close()

    def ended(self, best: Best | None) -> None:
        """Say which iteration had the lowest validation loss, if it is kept."""
        if self._config.keep_best and best:
            place = (
                f"update {best.iteration}, which is kept: --iteration {best.iteration}"
                if best.iteration
                else "--source"
            )
            log(f"lowest validation loss: {best.loss:.4f}, of {place}")

    def saved(self, step: int) -> None:
        """Note that the checkpoint of update `step` is published."""
        self._saved = step

    def last_saved(self) -> str:
        """The last saved update, for error messages."""
        return "nothing was saved" if self._saved is None else f"update {self._saved} is saved"

    def facts(self, step: int) -> dict[str, Any]:
        """The manifest's facts of the iteration."""
        samples = self._earlier + step * self._config.global_batch_size
        facts = self._facts() | {
            "step": step,
            "consumed_tokens": samples * self._config.sequence_length,
            "data_order": self._order,
            "data": self._blend.facts(samples),
        }
        if loss_over_micro_batch(self._inputs.architecture):
            facts["micro_batch_size"] = self._config.micro_batch_size  # a resume with another is refused
        if self._metrics is not None:
            for name in ("loss", "mtp_loss", "validation_loss", "validation_mtp_loss", "bits_per_byte"):
                known = [row[name] for row in self._metrics.rows if name in row]
                facts |= {name: known[-1]} if known else {}
        return facts

    def _facts(self) -> dict[str, Any]:
        architecture = self._inputs.architecture
        ignored = recorded_ignored(self._inputs.source.hf_files)
        return {
            "family": architecture.family,
            "dtype": DTYPES[self._config.precision],
            **({"fp8": str(self._config.fp8)} if self._config.fp8 else {}),
            "parameters": architecture.parameter_count(),
            "architecture": architecture.to_dict(),
            **({"ignored_config_fields": list(ignored)} if ignored else {}),
            **self._adapter(),
        }

    def _adapter(self) -> dict[str, Any]:
        """The fact of a run that trains LoRA adapters: their settings, and the base by path and by content."""
        lora, source = self._config.lora, self._inputs.source
        if lora is None:
            return {}
        base = adapter_directory.base_of(source.path, source.manifest, self._directory.path)
        return {adapter_directory.FACT: {**asdict(lora), "targets": list(lora.targets), "base": base}}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
