"""Control groups of this process, by which Docker, Slurm and systemd limit memory and CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each control group that this process is in, innermost first, and its version, 1 or 2.

    `controller` is `memory` or `cpu`. Not every folder is there: a container does not see the groups around it.
    """
    lines: list[str] = []
    with suppress(OSError):  # not Linux
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if controllers else "")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, 1 if controllers else 2
            if folder == root:
                break
