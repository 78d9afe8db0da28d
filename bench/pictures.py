"""The pictures of the results: a few charts for whoever does not want to read the tables.

Duty: draw what the rows hold, and leave out a chart whose rows did not run. Bars are medians over the rounds,
whiskers the least and the greatest. matplotlib comes with the bench extra; without it nothing is drawn.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import RCLONE, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
READERS = (1, 8, 32)
Values = dict[str, list[float]]

# A subject's name in the legend and its colour: ours in blue and green, peers in warm colours, ceilings in grey.
LOOKS = {
    "amlmount-declared": ("amlmount, order announced", "#0b6e4f"),
    "amlmount": ("amlmount", "#1f6fb4"),
    RCLONE: ("rclone mount, best of its settings", "#e07b39"),
    "adlfs": ("adlfs, in the reader's process", "#c9a227"),
    "adlfs-fuse": ("adlfs below fsspec's FUSE", "#9c4f4f"),
    "obstore": ("obstore alone (no mount)", "#9aa0a6"),
    "obstore-128": ("obstore alone, 128 threads", "#5f6368"),
    "local-disk": ("the same files on the local disk", "#9aa0a6"),
}
FONT: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(rows: Sequence[Row], about: dict[str, str], folder: Path, prefix: str) -> list[str]:
    """Write every chart that has something to show as `prefix`-NAME.png; the names of the files."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = {row.name: row for row in rows if row.rounds}
    charts: tuple[tuple[str, Callable[[dict[str, Row]], Figure | None]], ...] = (
        ("small-files", _small_files),
        ("second-epoch", _second_epoch),
        ("large-files", _large_files),
        ("ratios", _ratios),
    )
    written = []
    with pyplot.rc_context(FONT):
        for name, chart in charts:
            figure = chart(found)
            if figure is not None:
                _caption(figure, rows, about)
                figure.savefig(folder / f"{prefix}-{name}.png", dpi=DPI)
                pyplot.close(figure)
                written.append(f"{prefix}-{name}.png")
    return written


def _small_files(rows: dict[str, Row]) -> Figure | None:
    """Files a second in the first epoch, by the number of readers."""
    panels = _by_order(rows, "small")
    if not panels:
        return None
    figure, axes = _panels(len(panels), height=5.0)
    for axis, (title, groups) in zip(axes, panels, strict=True):
        subjects = [name for name in LOOKS if any(name in group for group in groups.values())]
        _bars(axis, groups, subjects)
        axis.set_yscale("log")
        axis.set_title(title)
        axis.yaxis.set_major_formatter(lambda value, _place: f"{value:,g}")
        axis.set_ylabel("files per second (log scale)")
        lowest, highest = axis.get_ylim()
        axis.set_ylim(lowest / 1.5, highest * 1.4)
    figure.suptitle(
        "First epoch: small files, new mount, empty cache; 20 ms to first byte, 80 MB/s per connection"
    )
    _legend(figure, axes)
    return figure


def _second_epoch(rows: dict[str, Row]) -> Figure | None:
    """Files a second from the cache on disk, next to plain files."""
    panels = _by_order(rows, "small-second")
    if not panels:
        return None
    figure, axes = _panels(len(panels), height=4.4)
    for axis, (title, groups) in zip(axes, panels, strict=True):
        _bars(axis, groups, ["amlmount", RCLONE, "local-disk"])
        axis.set_title(title)
        axis.set_ylabel("files per second")
    figure.suptitle("Second epoch: small files, mounted again on the same cache, page cache dropped")
    _legend(figure, axes)
    return figure


def _large_files(rows: dict[str, Row]) -> Figure | None:
    """Megabytes a second of what is not small."""
    labels = {
        "sequential": "one file",
        "sequential-near": "one file,\nno added delay",
        "eight-files": "eight files,\neight readers",
        "records": "TFRecord shards,\nfour workers",
        "columns": "Parquet columns,\none reader",
        "random-1m": "random 1 MiB,\neight readers",
    }
    groups = {label: _values(rows[name], "mb_s") for name, label in labels.items() if name in rows}
    if not groups:
        return None
    figure, axes = _panels(1, height=4.8)
    _bars(axes[0], groups, ["amlmount", RCLONE, "adlfs", "adlfs-fuse", "obstore"])
    axes[0].set_ylabel("MB per second")
    figure.suptitle(
        "Large files, first read: 20 ms to first byte, 80 MB/s per connection where not said otherwise"
    )
    _legend(figure, axes)
    return figure


def _ratios(rows: dict[str, Row]) -> Figure | None:
    """How many times better than the best rclone, or than the local disk."""
    shown: list[tuple[str, str, list[float], float | None]] = []
    for row in rows.values():
        several = len(row.compared) > 1
        found = {ratio.peer for ratio in row.ratios()}
        wanted = RCLONE if RCLONE in found else "rclone-default"
        for ratio in row.ratios():
            if ratio.values and ratio.peer in (wanted, "local-disk"):
                words = [row.name, ratio.key.removesuffix("_s") if several else ""]
                words.append("announced" if ratio.ours.endswith("-declared") else "")
                goal = row.goal(ratio)
                peer = "local-disk" if ratio.peer == "local-disk" else RCLONE
                shown.append(
                    (
                        " ".join(word for word in words if word),
                        peer,
                        ratio.values,
                        goal.least if goal else None,
                    )
                )
    if not shown:
        return None
    shown.sort(key=lambda item: (item[1] != RCLONE, statistics.median(item[2])))
    figure, axes = _panels(1, height=1.9 + 0.24 * len(shown), width=9.0)
    axis = axes[0]
    for place, (_, peer, values, floor) in enumerate(shown):
        middle, colour = statistics.median(values), LOOKS[peer][1]
        spread = [[middle - min(values)], [max(values) - middle]]
        axis.errorbar(middle, place, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5)
        axis.annotate(
            f"{middle:.3g}",
            (max(values), place),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
        if floor is not None:
            axis.plot([floor], [place], marker="|", color="#c5221f", markersize=11, markeredgewidth=2)
    axis.axvline(1.0, color="#444444", linewidth=1)
    axis.set_yticks(range(len(shown)), [label for label, _, _, _ in shown])
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    lowest, highest = axis.get_xlim()
    axis.set_xlim(lowest, highest * 1.5)
    axis.set_xlabel("times better than the peer (log scale; 1: the same)")
    axis.grid(axis="x", alpha=0.3)
    for peer, label in ((RCLONE, "against rclone mount"), ("local-disk", "against the local disk")):
        if any(item[1] == peer for item in shown):
            axis.plot([], [], "o", color=LOOKS[peer][1], label=label)
    if any(item[3] is not None for item in shown):
        axis.plot([], [], "|", color="#c5221f", markersize=11, markeredgewidth=2, label="floor set for it")
    figure.suptitle("amlmount against its peers, row by row")
    _legend(figure, axes)
    return figure


def _values(row: Row, key: str) -> Values:
    """A figure's values of each subject, and of the best rclone of each round."""
    found = {subject: row.values(subject, key) for subject in row.rounds}
    best = []
    for number in range(max(len(rounds) for rounds in row.rounds.values())):
        name = row.best_of_rclone(number)
        figures = row.rounds[name][number] if name else None
        if figures and key in figures:
            best.append(figures[key])
    return {subject: values for subject, values in (found | {RCLONE: best}).items() if values}


def _by_order(rows: dict[str, Row], prefix: str) -> list[tuple[str, dict[str, Values]]]:
    """A panel for each order of the rows `PREFIX-ORDER-READERS`: its title, and files a second by readers."""
    panels = []
    for order, title in (("manifest", "in manifest order"), ("shuffled", "shuffled")):
        groups = {
            _readers(readers): _values(rows[f"{prefix}-{order}-{readers}"], "files_s")
            for readers in READERS
            if f"{prefix}-{order}-{readers}" in rows
        }
        if groups:
            panels.append((title, groups))
    return panels


def _readers(count: int) -> str:
    return f"{count} reader{'s' if count > 1 else ''}"


def _panels(count: int, *, height: float, width: float = 12.5) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width, height), sharey=True, squeeze=False)
    return figure, list(axes[0])


def _bars(axis: Axes, groups: dict[str, Values], subjects: Sequence[str]) -> None:
    """A bar for each subject in each group, its value above it; no gap where a subject has none there."""
    total = 0.84
    most = max(sum(name in group for name in subjects) for group in groups.values())
    width = total / most
    for place, group in enumerate(groups.values()):
        present = [name for name in subjects if name in group]
        for number, name in enumerate(present):
            values = group[name]
            middle = statistics.median(values)
            at = place + (number - (len(present) - 1) / 2) * width
            spread = [[middle - min(values)], [max(values) - middle]]
            error: dict[str, Any] = {"ecolor": "#333333", "elinewidth": 0.9, "capsize": 2}
            axis.bar(
                at, middle, width * 0.92, color=LOOKS[name][1], yerr=spread if len(values) > 1 else None,
                error_kw=error,
            )  # fmt: skip
            axis.annotate(
                _short(middle), (at, max(values)), (0, 3), textcoords="offset points", ha="center", fontsize=7
            )
    for name in subjects:
        if any(name in group for group in groups.values()):
            axis.bar([0], [0], 0, color=LOOKS[name][1], label=LOOKS[name][0])
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_xlim(-0.55, len(groups) - 0.45)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelleft=True)
    axis.yaxis.set_major_formatter(lambda value, _place: f"{value:,g}")
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, above the caption."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    room = 0.2 * lines + 0.55  # inches
    height = figure.get_figheight()
    ordered = [label for label, _ in LOOKS.values() if label in found]
    ordered += [label for label in found if label not in ordered]
    figure.legend(
        [found[label] for label in ordered], ordered, loc="lower center", ncols=columns, frameon=False,
        bbox_to_anchor=(0.5, 0.4 / height), fontsize=8.5,
    )  # fmt: skip
    figure.tight_layout(rect=(0, room / height, 1, 1 - 0.05 / height))


def _caption(figure: Figure, rows: Sequence[Row], about: dict[str, str]) -> None:
    """The machine and the method, in one line."""
    rounds = max((len(values) for row in rows for values in row.rounds.values()), default=0)
    machine = (
        f"{about.get('cores', '?')} cores ({about.get('processor', '?')}), {about.get('memory', '?')}, "
        f"{about.get('kernel', '?')}, Python {about.get('python', '?')}"
    )
    method = (
        f"up to {rounds} rounds in alternation: median, least and greatest" if rounds > 1 else "one round"
    )
    text = f"{machine}, rclone {about.get('rclone', 'absent')}\nOrigin, mount and readers share it; {method}"
    figure.text(
        0.5, 0.1 / figure.get_figheight(), text, ha="center", va="bottom", fontsize=7, color="#555555"
    )
