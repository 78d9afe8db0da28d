"""The results: rounds of figures, their ratios, and the Markdown and JSON written from them.

A ratio says how many times better our subject is than the peer in the same round (above 1: better, whichever
way the figure points); the one reported is the median over the rounds, with the least and the greatest.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

VERSIONED = ("amlmount", "pyfuse3", "obstore", "azure-storage-blob")

# Figures of the second table, in its columns' order: their key, the column's title, digits after the point.
COLUMNS = (
    ("mb_s", "MB/s", 0),
    ("reads_s", "reads/s", 0),
    ("entries_s", "entries/s", 0),
    ("median_ms", "median ms", 2),
    ("round_trips", "round trips", 2),
    ("fetched_per_asked", "fetched per byte asked", 2),
    ("requests_per_read", "requests per read", 2),
    ("bytes_per_read", "bytes per read", 0),
    ("mount_cpu_s_per_gib", "CPU s/GiB mount", 2),
    ("reader_cpu_s_per_gib", "reader", 2),
    ("origin_cpu_s_per_gib", "origin", 2),
    ("mount_cpu_ms_per_read", "CPU ms/read mount", 3),
    ("reader_cpu_ms_per_read", "reader", 3),
    ("origin_cpu_ms_per_read", "origin", 3),
    ("mount_peak_rss_mb", "peak RSS MB", 0),
    ("peak_rss_mb", "peak RSS MB", 0),
)


@dataclass
class Row:
    """The figures of one workload: for each subject, one dictionary for each round (None where it failed).

    `goals` are the least ratios wanted, by peer; `bounds` the least and most wanted of our own figures, by
    figure.
    """

    name: str
    title: str
    origin: str
    key: str
    higher_is_better: bool
    ours: str
    goals: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    rounds: dict[str, list[dict[str, float] | None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, subject: str, figures: dict[str, float] | None) -> None:
        """One more round of a subject."""
        self.rounds.setdefault(subject, []).append(figures)

    def values(self, subject: str, key: str) -> list[float]:
        """One figure in every round that has it."""
        return [figures[key] for figures in self.rounds.get(subject, ()) if figures and key in figures]

    def ratios(self) -> dict[str, list[float]]:
        """For each peer, the first subject's advantage in each round that both finished."""
        found = {}
        for peer in self.rounds:
            if peer == self.ours or self.ours not in self.rounds:
                continue
            pairs = [
                (mine[self.key], theirs[self.key])
                for mine, theirs in zip(self.rounds[self.ours], self.rounds[peer], strict=False)
                if mine and theirs
            ]
            found[peer] = [
                mine / theirs if self.higher_is_better else theirs / mine for mine, theirs in pairs
            ]
        return found


def machine() -> dict[str, str]:
    """The machine and the versions, for the reader of the results."""
    found = {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "processor": _processor(),
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "this checkout" if name == "amlmount" else "absent"
    return found


def version_of(command: list[str]) -> str:
    """The first line a program prints about its version (nginx prints it to its error output)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return "absent"
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def markdown(rows: list[Row], about: dict[str, str], method: list[str]) -> str:
    """Both tables and what is needed to read them."""
    lines = ["# Benchmark results", "", "; ".join(f"{key} {value}" for key, value in about.items()) + ".", ""]
    lines += [f"- {line}" for line in method]
    lines += [
        "",
        "## Ratios",
        "",
        "| workload | origin | amlmount against | times better (min..max) | goal |",
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    for row in rows:
        for peer, ratios in row.ratios().items():
            text = _spread(ratios, 2) if ratios else "failed"
            lines.append(
                f"| {row.name}: {row.title} | {row.origin} | {peer} | {text} | {_goal(row, peer, ratios)} |"
            )
    lines += ["", "## Bounds on amlmount's own figures", "", "| workload | figure | found | wanted |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in rows:
        for key, (least, most) in row.bounds.items():
            values = row.values(row.ours, key)
            if values:
                verdict = "met" if least <= statistics.median(values) <= most else "missed"
                wanted = f"{least:,g} or more" if math.isinf(most) else f"{most:,g} or less"
                lines.append(f"| {row.name} | {key} | {_spread(values, 2)} | {wanted}: {verdict} |")
    lines += ["", "## Figures", ""]
    for row in rows:
        if not row.rounds:
            continue
        lines += [f"### {row.name}: {row.title} ({row.origin})", ""]
        columns = [
            column for column in COLUMNS if any(row.values(subject, column[0]) for subject in row.rounds)
        ]
        lines.append("| subject | " + " | ".join(title for _, title, _ in columns) + " |")
        lines.append("| --- " * (len(columns) + 1) + "|")
        for subject in row.rounds:
            cells = [_spread(row.values(subject, key), digits) for key, _, digits in columns]
            lines.append(f"| {subject} | " + " | ".join(cells) + " |")
        lines += ["", *(f"Failed: {failure}" for failure in row.failures), ""]
    return "\n".join(lines).rstrip() + "\n"


def write(
    folder: Path, name: str, rows: list[Row], about: dict[str, str], method: list[str]
) -> tuple[Path, Path]:
    """Write `name`.md and `name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{name}.md", folder / f"{name}.json"
    text.write_text(markdown(rows, about, method), encoding="utf-8")
    content = {
        "machine": about,
        "method": method,
        "rows": [
            asdict(row) | {"ratios": {peer: _summary(values) for peer, values in row.ratios().items()}}
            for row in rows
        ],
    }
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return text, data


def _summary(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    if digits == 0 and max(values) < 10:
        digits = 2
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def _goal(row: Row, peer: str, ratios: list[float]) -> str:
    if peer not in row.goals:
        return ""
    verdict = "met" if ratios and statistics.median(ratios) >= row.goals[peer] else "missed"
    return f"{row.goals[peer]:g}: {verdict}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
