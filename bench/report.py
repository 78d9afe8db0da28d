"""The results: rounds of figures, their ratios, and the Markdown and JSON written from them.

A ratio says how many times better a subject of ours is than the peer in the same round (above 1: better,
whichever way the figure points); the one reported is the median over the rounds, with the least and the
greatest. The peer `rclone` is, in each round, the best of the rclone settings that ran in it.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

RCLONE = "rclone"

# Figures of the third table, in its columns' order: their key, the column's title, digits after the point.
COLUMNS = (
    ("files_s", "files/s", 0),
    ("mb_s", "MB/s", 0),
    ("reads_s", "reads/s", 0),
    ("entries_s", "entries/s", 0),
    ("ready_s", "s to ready", 2),
    ("find_s", "find s", 2),
    ("ls_s", "ls -lR s", 2),
    ("du_s", "du s", 2),
    ("median_ms", "median ms", 2),
    ("p99_ms", "99 % ms", 1),
    ("round_trips", "round trips", 2),
    ("fetched_per_asked", "fetched per byte asked", 2),
    ("requests", "requests", 0),
    ("requests_per_file", "requests per file", 2),
    ("requests_per_read", "requests per read", 2),
    ("bytes_per_read", "bytes per read", 0),
    ("mount_cpu_s_per_gib", "CPU s/GiB mount", 2),
    ("reader_cpu_s_per_gib", "reader", 2),
    ("origin_cpu_s_per_gib", "origin", 2),
    ("mount_cpu_ms_per_read", "CPU ms/read mount", 3),
    ("reader_cpu_ms_per_read", "reader", 3),
    ("origin_cpu_ms_per_read", "origin", 3),
    ("mount_cpu_ms_per_file", "CPU ms/file mount", 2),
    ("reader_cpu_ms_per_file", "reader", 2),
    ("origin_cpu_ms_per_file", "origin", 2),
    ("declare_s", "s to declare", 2),
    ("mount_peak_rss_mb", "peak RSS MB", 0),
    ("peak_rss_mb", "peak RSS MB", 0),
)


@dataclass(frozen=True)
class Compared:
    """A figure that subjects are compared by."""

    key: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Goal:
    """The least ratio wanted of one of ours against a peer, and the one aimed at, for the first figure."""

    peer: str
    least: float
    ours: str = "amlmount"
    aim: float | None = None

    def verdict(self, ratios: list[float]) -> str:
        """One cell: the floor and whether the median reaches it; the same for the aim."""
        found = statistics.median(ratios) if ratios else -math.inf
        text = f"{self.least:g}: {'met' if found >= self.least else 'missed'}"
        if self.aim is not None:
            text += f"; aim {self.aim:g}: {'met' if found >= self.aim else 'missed'}"
        return text


@dataclass(frozen=True)
class Ratio:
    """How many times better one of ours is than a peer, in each round that both finished."""

    ours: str
    peer: str
    key: str
    values: list[float]


@dataclass
class Row:
    """The figures of one workload: for each subject, one dictionary for each round (None where it failed).

    A subject that did not run in a round has None there, too. `bounds` are figures of the first of `ours`,
    with the least and the most wanted.
    """

    name: str
    title: str
    origin: str
    compared: tuple[Compared, ...]
    ours: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    bounds: tuple[tuple[str, float, float], ...] = ()
    rounds: dict[str, list[dict[str, float] | None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, subject: str, number: int, figures: dict[str, float] | None) -> None:
        """The figures of a subject in round `number` (from 0)."""
        rounds = self.rounds.setdefault(subject, [])
        rounds += [None] * (number - len(rounds))
        rounds.append(figures)

    def values(self, subject: str, key: str) -> list[float]:
        """One figure in every round that has it."""
        return [figures[key] for figures in self.rounds.get(subject, ()) if figures and key in figures]

    def best_of_rclone(self, number: int) -> str | None:
        """The rclone setting with the best first figure in a round."""
        wanted = self.compared[0]
        found = {
            subject: rounds[number][wanted.key]  # type: ignore[index]  # looked at below
            for subject, rounds in self.rounds.items()
            if subject.startswith(f"{RCLONE}-") and number < len(rounds) and rounds[number] is not None
        }
        choose = max if wanted.higher_is_better else min
        return choose(found, key=lambda subject: found[subject]) if found else None

    def ratios(self) -> list[Ratio]:
        """Each of ours against each peer, by each figure compared."""
        peers = [subject for subject in self.rounds if subject not in self.ours]
        if sum(peer.startswith(f"{RCLONE}-") for peer in peers) > 1:
            peers.insert(0, RCLONE)
        return [
            Ratio(ours, peer, compared.key, self._against(ours, peer, compared))
            for compared in self.compared
            for ours in self.ours
            if ours in self.rounds
            for peer in peers
        ]

    def _against(self, ours: str, peer: str, compared: Compared) -> list[float]:
        found = []
        for number, mine in enumerate(self.rounds[ours]):
            name = self.best_of_rclone(number) if peer == RCLONE else peer
            rounds = self.rounds.get(name or "", [])
            theirs = rounds[number] if number < len(rounds) else None
            if mine and theirs and compared.key in mine and compared.key in theirs:
                better, worse = mine[compared.key], theirs[compared.key]
                found.append(better / worse if compared.higher_is_better else worse / better)
        return found

    def goal(self, ratio: Ratio) -> Goal | None:
        """The goal set for a ratio, if any; one against the best rclone holds against the only one, too."""
        if ratio.key != self.compared[0].key:
            return None
        peers = {ratio.peer}
        if [name for name in self.rounds if name.startswith(f"{RCLONE}-")] == [ratio.peer]:
            peers.add(RCLONE)
        return next((goal for goal in self.goals if goal.ours == ratio.ours and goal.peer in peers), None)


def markdown(rows: list[Row], about: dict[str, str], method: list[str], pictures: list[str]) -> str:
    """The tables, the pictures, and what is needed to read them."""
    lines = ["# Benchmark results", "", "; ".join(f"{key} {value}" for key, value in about.items()) + ".", ""]
    lines += [f"- {line}" for line in method]
    lines += ["", *(f"![{name.rpartition('.')[0]}]({name})" for name in pictures)] if pictures else []
    lines += ["", "## Ratios", ""]
    lines += ["| workload | origin | subject | against | by | times better (min..max) | goal |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    titles = {key: title for key, title, _ in COLUMNS}
    for row in rows:
        for ratio in row.ratios():
            goal = row.goal(ratio)
            cells = [
                f"{row.name}: {row.title}",
                row.origin,
                ratio.ours,
                ratio.peer,
                titles[ratio.key],
                spread(ratio.values, 2) if ratio.values else "failed",
                goal.verdict(ratio.values) if goal else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Bounds on amlmount's own figures", "", "| workload | figure | found | wanted |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in rows:
        for key, least, most in row.bounds:
            values = row.values(row.ours[0], key)
            if values:
                verdict = "met" if least <= statistics.median(values) <= most else "missed"
                wanted = f"{least:,g} or more" if math.isinf(most) else f"{most:,g} or less"
                lines.append(f"| {row.name} | {titles[key]} | {spread(values, 2)} | {wanted}: {verdict} |")
    lines += ["", "## Figures", ""]
    for row in rows:
        if row.rounds:
            lines += _figures(row)
    return "\n".join(lines).rstrip() + "\n"


def _figures(row: Row) -> list[str]:
    shown = [column for column in COLUMNS if any(row.values(subject, column[0]) for subject in row.rounds)]
    if "requests" not in {key for key, _, _ in row.bounds}:
        shown = [column for column in shown if column[0] != "requests"]
    lines = [f"### {row.name}: {row.title} ({row.origin})", ""]
    lines.append("| subject | " + " | ".join(title for _, title, _ in shown) + " |")
    lines.append("| --- " * (len(shown) + 1) + "|")
    for subject in row.rounds:
        cells = [spread(row.values(subject, key), digits) for key, _, digits in shown]
        lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"Failed: {failure}" for failure in row.failures), ""]


def write(
    folder: Path,
    name: str,
    rows: list[Row],
    about: dict[str, str],
    method: list[str],
    pictures: list[str],
) -> tuple[Path, Path]:
    """Write `name`.md and `name`.json; `pictures` are files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{name}.md", folder / f"{name}.json"
    text.write_text(markdown(rows, about, method, pictures), encoding="utf-8")
    content = {
        "machine": about,
        "method": method,
        "rows": [
            asdict(row) | {"ratios": [asdict(ratio) | _summary(ratio.values) for ratio in row.ratios()]}
            for row in rows
        ],
    }
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return text, data


def load(data: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows and the machine of a JSON file written before."""
    content = json.loads(data.read_text(encoding="utf-8"))
    rows = [
        Row(
            found["name"],
            found["title"],
            found["origin"],
            tuple(Compared(**compared) for compared in found["compared"]),
            tuple(found["ours"]),
            tuple(Goal(**goal) for goal in found["goals"]),
            tuple((key, least, most) for key, least, most in found["bounds"]),
            found["rounds"],
            found["failures"],
        )
        for found in content["rows"]
    ]
    return rows, content["machine"]


def _summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: list[float], digits: int) -> str:
    """The median, and the least and the greatest where there are several."""
    if not values:
        return ""
    if digits == 0 and max(values) < 10:
        digits = 2
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"
