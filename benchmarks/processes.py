"""The processes below one, from /proc: what they are, how much memory they hold. Linux only; reads, never changes."""

from __future__ import annotations

import os
import re
from pathlib import Path


def below(root: int) -> dict[int, str]:
    """Process id and command line of every process that `root` started, at any remove."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:  # it has ended meanwhile
                continue

    def is_below(process: int) -> bool:
        parent = parents.get(process, 0)
        return parent == root or (parent > 1 and is_below(parent))

    return {process: command for process, command in commands.items() if is_below(process)}


def own_memory_mib(process: int) -> float:
    """Resident memory of a process without what it shares (the object store); 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    sizes = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
    return (int(sizes.get("RssAnon", 0)) + int(sizes.get("RssFile", 0))) / 1024


def shared_memory_mib(process: int) -> float:
    """Resident shared memory of a process; 0 when it has ended."""
    try:
        found = re.search(r"^RssShmem:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proportional_memory_mib(process: int) -> float:
    """Proportional set size of a process: what is its own, and its share of what several map; 0 when it has ended."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
