"""The rehearsals of big models, and one of each family on 1,024 H100s: `make rehearsals`.

Goes on where it stopped: `recorded.json` beside this file has what was rehearsed, and docs/rehearsal.md its tables. `fresh`
as an argument begins anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

from shared.runtime.silence_warnings import silence

silence()

from shared.rehearsal import reexecute  # noqa: E402
from shared.rehearsal.forks import in_forks  # noqa: E402
from shared.rehearsal.launch_map import TITLES, Nodes  # noqa: E402
from shared.rehearsal.machine import GPUS  # noqa: E402
from shared.rehearsal.speed import GPUS_PER_NODE, SPEEDS  # noqa: E402
from tests.rehearsals.cases import (  # noqa: E402
    FAMILY_GPUS,
    GPU,
    ROWS,
    Row,
    architecture_of,
    base,
    config_of,
    largest_of_each_family,
)
from tests.rehearsals.tables import RECORDED, write_pages  # noqa: E402

MiB = 2**20


def planner(row: Row) -> Any:
    from shared.training.choose_layout import Planner

    return Planner(
        architecture_of(row.model),
        base(row),
        gpus=row.gpus,
        gpu=GPUS[GPU],
        speed=SPEEDS[GPU],
        nodes=Nodes.filled(row.gpus, GPUS_PER_NODE),
    )


def rehearsed(row: Row) -> list[dict[str, Any]]:
    """A record for each stage that was played."""
    from shared.training.layout_candidates import Candidate

    plan, config = planner(row), config_of(row)
    config.check_model(plan.architecture)
    candidate = Candidate(config=config)
    (found,) = plan.rehearse([(candidate, plan.held(config.parallel))])
    if found.failed:
        raise RuntimeError(f"{row}: {found.failed}")
    assert found.update is not None
    return [
        {
            "stage": number,
            "states": played.states,
            "held": list(played.held.values()),
            "peak": played.peak,
            "reserved": played.reserved,
            "communication": communication(played),
            "layout": candidate.short(),
            "seconds_update": found.update.seconds,
            "mfu": found.mfu(plan.architecture, plan.speed),
            "rehearsal_seconds": round(found.seconds, 1),
        }
        for number, played in found.played.items()
    ]


def communication(played: Any) -> dict[str, float]:
    """MiB that a rank's operations move in the update that was played, by kind of group."""
    found: dict[str, float] = defaultdict(float)
    for each in played.operations:
        if each.phase.endswith("of update 2"):
            found[TITLES.get(each.group, "other")] += each.moved / MiB
    return {title: round(size) for title, size in found.items() if size >= 1}


def first(plan: Any) -> tuple[Any, Any]:
    """The first layout that fits, not timed, or None; and the search. What was rehearsed corrects guesses of activations."""
    from shared.training.choose_layout import Search
    from shared.training.layout_candidates import Sizes, guessed_bytes, least_states

    found, sizes, worse = Search(), Sizes.of(plan.architecture, plan.base.sequence_length), 1.0
    for _, candidate, held in plan.promising(found):
        if candidate.parallel.virtual_pipeline > 1:  # twice as many micro batches to play
            continue
        states = max(stage.total for stage in held)
        activations = guessed_bytes(sizes, candidate) - least_states(sizes, candidate.config)
        if states + worse * activations > plan.gpu.usable:
            continue
        (front,) = plan.rehearse([(candidate, held)], timed=False, stages=lambda parallel: (0,))  # the fullest, mostly
        if front.fits(plan.gpu):
            (rest,) = plan.rehearse([(candidate, held)], timed=False, stages=lambda parallel: plan.stages(parallel)[1:])
            front = replace(rest, played={**front.played, **rest.played})
        found.rehearsed.append(front)
        if front.fits(plan.gpu):
            return front, found
        worse = max(worse, (front.reserved - states) / activations)
    return None, found


def family(model: str) -> dict[str, Any]:
    """The first layout that fits."""
    row = Row(model=model, gpus=FAMILY_GPUS, layout={}, global_batch_size=FAMILY_GPUS)
    plan = planner(row)
    fitting, found = first(plan)
    if fitting is None:
        return {"model": model, "fits": False, "failed": [each.failed for each in found.rehearsed if each.failed][:1]}
    return {
        "model": model,
        "fits": True,
        "parameters": plan.architecture.parameter_count(),
        "layout": fitting.candidate.short(),
        "flags": fitting.candidate.flags,
        "reserved": fitting.reserved,
        "legal": found.legal,
    }


def main(arguments: list[str]) -> None:
    if not reexecute.playing():
        reexecute.reexecute(GPUS[GPU])
    from shared.rehearsal import fake_world

    fake_world.before_forking()
    import shared.training.choose_layout  # noqa: F401 -- once, for all forks

    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() and "fresh" not in arguments else {}
    rows, families = recorded.setdefault("rows", {}), recorded.setdefault("families", {})

    def save() -> None:
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
        write_pages(recorded)

    for row in ROWS:
        if row.name not in rows:
            rows[row.name] = rehearsed(row)
            save()
            print(row.name, rows[row.name][0]["rehearsal_seconds"], "s", flush=True)

    def said(name: str, found: Any) -> None:
        if isinstance(found, Exception):
            raise found
        families[name] = found
        save()
        print(name, found, flush=True)

    missing = {name: partial(family, model) for name, model in largest_of_each_family().items() if name not in families}
    in_forks(missing, at_once=len(os.sched_getaffinity(0)), returned=AssertionError, done=said)
    recorded["families"] = {name: families[name] for name in largest_of_each_family()}
    save()


if __name__ == "__main__":
    main(sys.argv[1:])
