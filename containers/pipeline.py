"""The demo in containers: every stage of demo/stages.py in its tool's image, through the docker package.

    containers/.venv/bin/python containers/pipeline.py --work DIR

Each stage's `docker run` line is printed before it runs, then its log. Ctrl-C and SIGTERM stop the stage like `docker stop`,
with time to save, and exit with code 75; the same command resumes. Finished stages are skipped. A failed stage's exit code is
returned. CONVERT_VERSION=0.2.0 selects that version of one tool.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import Job, command_line, jobs, keywords, slug

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container
    from rich.progress import Progress

EXIT_USAGE, EXIT_INTERRUPTED = 2, 75
SAVING = 120  # seconds to save after a stop signal
LABEL = "baton.pipeline"  # on each container: the work directory it writes to


def main() -> int:
    """Run the chosen stages in order, up to the first failure; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("demo-work"), help="directory for everything (default: %(default)s)"
    )
    parser.add_argument("--only", metavar="STAGE", action="append", help="run this stage; may be given again")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--gpus", action="store_true", help="give every GPU to the stages that compute")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the docker commands as a shell script, run nothing"
    )
    options = parser.parse_args()
    work = options.work.resolve()
    if ":" in str(work):
        parser.error(f"--work {work}: Docker takes no colon in a path that it mounts")
    every = jobs(work, gpus=options.gpus)
    try:
        chosen = choose(every, options.only, options.until)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        head = ("set -eu", shlex.join(["mkdir", "-p", str(work)]))
        print(*head, *(f"# {job.name}\n{command_line(job)}" for job in chosen), sep="\n")
        return 0
    work.mkdir(parents=True, exist_ok=True)
    with (work / "demo.lock").open("w") as lock:  # the lock of demo/demo.py
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return fail(f"another demo is at work in {work}")
        code = run_all(chosen, work)
    if code or chosen != every:
        return code
    from demo import verdict  # demo/ is on the path since jobs was imported

    return verdict(work)


def choose(every: list[Job], only: list[str] | None, until: str | None) -> list[Job]:
    """The selected stages, in the demo's order. ValueError for an unknown stage."""
    known = {slug(job.name): place for place, job in enumerate(every)}
    for name in [*(only or []), *([until] if until else [])]:
        if slug(name) not in known:
            raise ValueError(f"no stage {name!r}; one of: {', '.join(known)}")
    last = known[slug(until)] if until else len(every)
    wanted = {slug(name) for name in only} if only else set(known)
    return [job for place, job in enumerate(every) if place <= last and slug(job.name) in wanted]


def run_all(chosen: list[Job], work: Path) -> int:
    """Check Docker engine and images, then run the stages."""
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        client = docker.from_env()
        client.ping()
    except (DockerException, RequestException) as error:
        where = os.environ.get("DOCKER_HOST", "its usual socket")
        return fail(f"no Docker engine answers at {where}: {cause(error)}; start one, or set DOCKER_HOST")
    here = {tag for image in client.images.list() for tag in image.tags}
    missing = list(dict.fromkeys(job for job in chosen if job.image not in here))
    if missing:
        names = " ".join(dict.fromkeys(job.image for job in missing))
        targets = " ".join(dict.fromkeys(job.target for job in missing))
        return fail(f"missing images: {names}; build them with: make {targets}")
    try:
        return Pipeline(client, work).run(chosen)
    except (DockerException, RequestException) as error:
        return fail(first_line(error), code=1)


class Pipeline:
    """Runs stages in order and handles signals."""

    def __init__(self, client: DockerClient, work: Path) -> None:
        from rich.console import Console

        self._client = client
        self._work = work
        terminal = sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=True, width=None if terminal else 160)
        self._container: Container | None = None
        self._signals = 0

    def run(self, chosen: list[Job]) -> int:
        """Returns 0, 75 after a stop signal, or the exit code of the failed stage."""
        for told in (signal.SIGTERM, signal.SIGINT):
            signal.signal(told, self._on_signal)
        self._stop_leftovers()
        results = []
        with self._progress(chosen) as progress:
            for place, job in enumerate(chosen, start=1):
                task = progress.task_ids[0]
                progress.update(task, description=job.name)
                self._say(f"\n=== {job.name} ({place} of {len(chosen)})\n$ {command_line(job)}")
                began = time.monotonic()
                code, last = self._stage(job)
                if self._signals:
                    return fail(f"stopped in `{job.name}`; run the same command again to resume", code=EXIT_INTERRUPTED)
                if code:
                    return fail(f"`{job.name}` ended with exit code {code}: {last}", code=code)
                seconds = time.monotonic() - began
                results.append((job, seconds))
                self._say(f"=== {job.name}: {job.says() or 'done'} ({seconds:.0f} s)")
                progress.advance(task)
        self._table(results)
        return 0

    def _stage(self, job: Job) -> tuple[int, str]:
        """Run one container and remove it. Returns its exit code and the last line of its log."""
        container = self._client.containers.create(**keywords(job), labels={LABEL: str(self._work)})
        self._container = container
        last = ""
        try:
            if self._signals:
                return EXIT_INTERRUPTED, ""
            output = container.attach(stream=True, logs=True, demux=True)  # before the start: no line is lost
            container.start()
            if self._signals:  # the signal came before the start
                self._stop(container)
            for line in lines(output):
                self._say(f"{job.name} | {line}")
                last = line or last
            code = int(container.wait()["StatusCode"])
            container.reload()
            if container.attrs["State"]["OOMKilled"]:
                last = "out of memory"
            return code, last
        finally:
            self._container = None
            container.remove(force=True)

    def _on_signal(self, signum: int, frame: object) -> None:
        """Signal handler: stop the stage with time to save, at a second signal at once. The log continues."""
        self._signals += 1
        if self._container is not None:
            threading.Thread(target=self._stop, args=(self._container,), daemon=True).start()

    def _stop(self, container: Container) -> None:
        import docker
        from docker.errors import NotFound

        own = docker.from_env().containers  # a second client: the first is reading the log
        with suppress(NotFound):  # it has already ended
            own.get(container.id).stop(timeout=SAVING if self._signals == 1 else 0)

    def _stop_leftovers(self) -> None:
        """Stop the stage of a killed pipeline: two must not write to the same directory."""
        for container in self._client.containers.list(all=True, filters={"label": f"{LABEL}={self._work}"}):
            self._say(f"stopping {container.name}, which an earlier pipeline left")
            container.stop(timeout=SAVING)
            container.remove(force=True)

    @contextmanager
    def _progress(self, chosen: list[Job]) -> Iterator[Progress]:
        """Progress bar over the stages, on a terminal only."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            progress.add_task("", total=len(chosen))
            yield progress

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False)

    def _table(self, results: list[tuple[Job, float]]) -> None:
        from rich.table import Column, Table

        table = Table("stage", "image", Column("time", justify="right"), "result", box=None)
        for job, seconds in results:
            table.add_row(job.name, job.image, f"{seconds:.0f} s", job.says())
        self._console.print(table)


def lines(output: Iterator[tuple[bytes | None, bytes | None]]) -> Iterator[str]:
    """Complete lines of a container's stdout and stderr; of a line overwritten with carriage returns, the final text."""
    rests = [b"", b""]
    for pieces in output:
        for stream, piece in enumerate(pieces):
            *whole, rests[stream] = (rests[stream] + (piece or b"")).split(b"\n")
            yield from map(_text, whole)
    yield from map(_text, filter(None, rests))


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def first_line(error: Exception) -> str:
    """The first line of a Docker error."""
    explanation = getattr(error, "explanation", None) or str(error)
    return str(explanation).strip().splitlines()[0]


def cause(error: BaseException) -> str:
    """The operating system's error below the client's."""
    while below := error.__cause__ or error.__context__:
        error = below
    return getattr(error, "strerror", None) or str(error)


def fail(message: str, code: int = EXIT_USAGE) -> int:
    """Print the message; returns the exit code."""
    print(f"pipeline: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
