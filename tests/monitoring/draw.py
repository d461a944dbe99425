"""Draws the panels of a dashboard from what `pictures.py` wrote down. Not a screenshot of Grafana: its layout, titles, units and queries.

Run with matplotlib's own environment, which has nothing else: no import of ours.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]  # not in the environment mypy looks at

mpl.use("Agg")
import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).resolve().parents[2]
FOUND = json.loads((ROOT / "build/monitoring/panels.json").read_text())
IMAGES = ROOT / "docs/images"
LINES = {
    "operations": {"Now": 1, "Flow": 1, "Spool": 1, "Sinks": 2, "Enrichment": 1},
    "security": {"In the chosen time": 1, "Alerts (CloudWatch Logs Insights)": 3, "Findings": 1},
}
"""How many lines of panels of which rows: all of them would be too long for a page."""
WIDTH_INCHES, UNIT_INCHES, DPI = 14.0, 0.29, 100
BACK, PANEL, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2b2e35", "#d8d9da", "#8e9199"
COLORS = [
    "#73bf69",
    "#f2cc0c",
    "#8ab8ff",
    "#ff780a",
    "#f2495c",
    "#b877d9",
    "#5794f2",
    "#ffa6b0",
    "#96d98d",
    "#fade2a",
    "#ca95e5",
    "#56a64b",
]
NAMED = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "blue": "#8ab8ff"}
SERIES_MAX, SERIES_FEW = 8, 3
"""Where there are many, those that are always 0 are left out."""
GAP_SECS = 5.0
LONG_NAME = 22
ROWS_MAX = 8
CELL_MAX = 44

Object = dict[str, Any]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    plt.rcParams |= {
        "font.family": "DejaVu Sans",
        "text.color": TEXT,
        "axes.edgecolor": EDGE,
        "axes.labelcolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "text.parse_math": False,
    }
    for name, lines in LINES.items():
        figure = _dashboard(_chosen(FOUND[name], lines))
        file = IMAGES / f"{name}.png"
        figure.savefig(
            file, dpi=DPI, facecolor=BACK, metadata={"Software": None}, pil_kwargs={"optimize": True}
        )
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1024} kB")  # noqa: T201 - a program of the command line


def _chosen(panels: list[Object], lines: dict[str, int]) -> list[Object]:
    """The first lines of the chosen rows, moved together."""
    chosen: list[Object] = []
    top, row = 0, ""
    for place, panel in enumerate(panels):
        if panel["type"] != "row" or panel["title"] not in lines:
            continue
        row = panel["title"]
        rest = panels[place + 1 :]
        end = next((number for number, it in enumerate(rest) if it["type"] == "row"), len(rest))
        heights = sorted({it["gridPos"]["y"] for it in rest[:end]})[: lines[row]]
        inside = [it for it in rest[:end] if it["gridPos"]["y"] in heights]
        shift = top - panel["gridPos"]["y"]
        for it in (panel, *inside):
            it["gridPos"]["y"] += shift
            chosen.append(it)
        top = max(it["gridPos"]["y"] + it["gridPos"]["h"] for it in chosen)
    return chosen


def _dashboard(panels: list[Object]) -> Any:
    units = max(it["gridPos"]["y"] + it["gridPos"]["h"] for it in panels)
    high = units * UNIT_INCHES
    figure = plt.figure(figsize=(WIDTH_INCHES, high))
    for panel in panels:
        place = panel["gridPos"]
        left, width = place["x"] / 24, place["w"] / 24
        top, height = 1 - place["y"] / units, place["h"] / units
        gap = 0.04 / WIDTH_INCHES, 0.04 / high
        box = left + gap[0], top - height + gap[1], width - 2 * gap[0], height - 2 * gap[1]
        if panel["type"] == "row":
            figure.text(
                box[0] + 0.006,
                top - height / 2,
                f"\N{BLACK DOWN-POINTING SMALL TRIANGLE} {panel['title']}",
                fontsize=10,
                va="center",
                weight="bold",
            )
            continue
        figure.add_artist(
            plt.Rectangle(
                box[:2],
                box[2],
                box[3],
                transform=figure.transFigure,
                zorder=-5,
                facecolor=PANEL,
                edgecolor=EDGE,
                linewidth=0.8,
            )
        )
        figure.text(
            box[0] + 0.006,
            box[1] + box[3] - 0.09 / high,
            panel["title"],
            fontsize=8.5,
            va="top",
            weight="bold",
        )
        _body(figure, panel, box, high)
    return figure


def _body(figure: Any, panel: Object, box: tuple[float, float, float, float], high: float) -> None:
    kind = panel["type"]
    if kind == "table":
        _table(figure, panel, box, high)
        return
    if kind == "stat":
        _stat(figure, panel, box)
        return
    legend = 0.42 if kind != "state-timeline" else 0.1
    inner = (
        box[0] + 0.62 / WIDTH_INCHES,
        box[1] + (0.26 + legend) / high,
        box[2] - 0.78 / WIDTH_INCHES,
        box[3] - (0.64 + legend) / high,
    )
    if kind == "state-timeline":
        inner = (inner[0] + 0.75 / WIDTH_INCHES, inner[1], inner[2] - 0.75 / WIDTH_INCHES, inner[3])
    axes = figure.add_axes(inner, facecolor=PANEL)
    axes.tick_params(labelsize=7, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, color=EDGE, linewidth=0.6)
    axes.set_axisbelow(True)
    if kind == "state-timeline":
        _states(axes, panel)
    elif panel["targets"][0]["datasource"]["type"] == "cloudwatch":
        _bars(axes, panel)
    else:
        _lines(axes, panel)
    axes.set_xlim(FOUND["start"], FOUND["end"])
    ticks = [FOUND["start"] + secs for secs in range(0, int(FOUND["end"] - FOUND["start"]) + 1, 60)]
    axes.set_xticks(ticks, [dt.datetime.fromtimestamp(it, dt.UTC).strftime("%H:%M:%S") for it in ticks])


def _series(panel: Object) -> list[tuple[str, list[float], list[float]]]:
    """Name, times and values; those with the largest values first."""
    found = []
    for target, answers in zip(panel["targets"], panel["found"], strict=True):
        for answer in answers:
            name = target["legendFormat"]
            for label, text in answer["metric"].items():
                name = name.replace("{{" + label + "}}", text)
            points = [(time, float(value)) for time, value in answer["values"] if value != "NaN"]
            for place in range(len(points) - 1, 0, -1):
                if points[place][0] - points[place - 1][0] > GAP_SECS:
                    points.insert(place, (points[place - 1][0] + 1, math.nan))
            if points:
                found.append((name.strip(), [time for time, _ in points], [value for _, value in points]))
    return sorted(found, key=lambda it: -_most(it[2]))


def _most(values: list[float]) -> float:
    return max(value for value in values if not math.isnan(value))


def _lines(axes: Any, panel: Object) -> None:
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    shown = _series(panel)
    if stacked or len(shown) > SERIES_FEW:
        shown = [it for it in shown if _most(it[2]) > 0] or shown[:SERIES_FEW]
    shown = shown[:SERIES_MAX]
    if stacked and shown:
        times = sorted({time for _, found, _ in shown for time in found})
        rows = [
            [dict(zip(at, values, strict=True)).get(time, 0.0) for time in times] for _, at, values in shown
        ]
        axes.stackplot(times, rows, colors=COLORS, alpha=0.75, linewidth=0)
    else:
        for place, (_, times, values) in enumerate(shown):
            axes.plot(times, values, color=COLORS[place % len(COLORS)], linewidth=1.3)
            axes.fill_between(times, values, color=COLORS[place % len(COLORS)], alpha=0.08)
    _finish(axes, panel, [name for name, _, _ in shown])


def _bars(axes: Any, panel: Object) -> None:
    """Counts of Logs Insights by time and one more field."""
    rows = panel["found"][0]
    names = [it for it in rows[0] if not it.startswith("bin(") and it != "alerts"]
    at = next(it for it in rows[0] if it.startswith("bin("))
    totals: dict[str, int] = {}
    for row in rows:
        totals[row[names[0]]] = totals.get(row[names[0]], 0) + row["alerts"]
    order = sorted(totals, key=lambda it: -totals[it])[:SERIES_MAX]
    times = sorted({row[at] for row in rows})
    low = [0] * len(times)
    for place, name in enumerate(order):
        counts = {row[at]: row["alerts"] for row in rows if row[names[0]] == name}
        values = [counts.get(time, 0) for time in times]
        axes.bar(
            [time / 1000 for time in times], values, bottom=low, width=8.5, align="edge", color=COLORS[place]
        )
        low = [a + b for a, b in zip(low, values, strict=True)]
    _finish(axes, panel, order)


def _finish(axes: Any, panel: Object, names: list[str]) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] <= 1e-6 or not names:
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(plt.MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: _text(value, unit))
    handles = [
        plt.Line2D([], [], color=COLORS[place % len(COLORS)], linewidth=2.5) for place in range(len(names))
    ]
    columns = max(
        1,
        min(
            len(names),
            10 if panel["gridPos"]["w"] > 8 else 3 if max(map(len, names), default=0) < LONG_NAME else 2,
        ),
    )
    if names:
        axes.legend(
            handles,
            [it[:30] for it in names],
            loc="upper left",
            bbox_to_anchor=(-0.06, -0.13),
            ncols=columns,
            fontsize=6.5,
            frameon=False,
            labelcolor=TEXT,
            handlelength=1.0,
            columnspacing=1.0,
            borderaxespad=0,
            handletextpad=0.4,
            labelspacing=0.3,
        )


def _states(axes: Any, panel: Object) -> None:
    meanings = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    shown = sorted(_series(panel))
    step = 2.0
    for place, (_, times, values) in enumerate(shown):
        for time, value in zip(times, values, strict=True):
            color = NAMED[meanings.get(str(int(value)), {"color": "blue"})["color"]]
            axes.barh(place, step, left=time, height=0.75, color=color, linewidth=0)
    axes.set_yticks(range(len(shown)), [name.replace("falco-aws-forwarder-", "") for name, _, _ in shown])
    axes.grid(visible=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)


def _stat(figure: Any, panel: Object, box: tuple[float, float, float, float]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    shown = _series(panel)
    values = [values[-1] for _, _, values in shown]
    texts = [
        _text(round(value) if "decimals" in defaults else value, defaults["unit"]) for value in values
    ] or [defaults.get("noValue", "no data")]
    color = NAMED["blue"]
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or (values and values[0] >= step["value"]):
            color = NAMED[step["color"]]
    if len(shown) == 1 and not panel["targets"][0]["instant"]:
        axes = figure.add_axes((box[0] + 0.002, box[1] + 0.001, box[2] - 0.004, box[3] * 0.38))
        axes.fill_between(shown[0][1], shown[0][2], color=color, alpha=0.18, linewidth=0)
        axes.plot(shown[0][1], shown[0][2], color=color, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.axis("off")
    figure.text(
        box[0] + box[2] / 2,
        box[1] + box[3] * 0.5,
        " / ".join(texts),
        fontsize=20,
        color=color,
        ha="center",
        va="center",
        weight="bold",
    )


def _table(figure: Any, panel: Object, box: tuple[float, float, float, float], high: float) -> None:
    rows = panel["found"][0]
    if rows and "metric" in rows[0]:
        rows = [
            it["metric"] | {"value": _text(float(it["value"][1]), panel["fieldConfig"]["defaults"]["unit"])}
            for it in rows
        ]
    names = list(rows[0]) if rows else []
    texts = [[_cell(row.get(name), name) for name in names] for row in rows[:ROWS_MAX]]
    widths = [
        max(len(it) for it in (names[place].rpartition(".")[2], *(row[place] for row in texts)))
        for place in range(len(names))
    ]
    room = sum(widths) + 2 * len(widths)
    line = 0.205 / high
    for number, row in enumerate([[it.rpartition(".")[2] for it in names], *texts]):
        done = 0
        for place, text in enumerate(row):
            left = box[0] + 0.008 + (box[2] - 0.012) * done / room
            most = max(6, int((box[2] * WIDTH_INCHES / 0.071) * (widths[place] + 2) / room))
            shown = text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
            figure.text(
                left,
                box[1] + box[3] - 0.36 / high - number * line,
                shown,
                fontsize=7,
                va="top",
                color=TEXT if number else NAMED["blue"],
            )
            done += widths[place] + 2


def _cell(value: Any, name: str) -> str:
    if value is None:
        return "-"
    if name == "@timestamp":
        return dt.datetime.fromtimestamp(value / 1000, dt.UTC).strftime("%H:%M:%S")
    return str(value).replace("\n", " ")[:CELL_MAX]


def _text(value: float, unit: str) -> str:  # noqa: PLR0911 - one unit a line
    """As Grafana would write it, nearly."""
    if unit == "percentunit":
        return f"{100 * value:.2f} %"
    if unit == "s":
        for size, name in (
            (86400, "d"),
            (3600, "h"),
            (60, "min"),
            (1, "s"),
            (1e-3, "ms"),
            (1e-6, "\N{MICRO SIGN}s"),
        ):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return "0 s"
    if unit in {"bytes", "Bps"}:
        end = "/s" if unit == "Bps" else ""
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}{end}"
        return f"{value:.0f} B{end}"
    end = {"cps": " /s", "reqps": " /s"}.get(unit, "")
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}K{end}"
    return f"{value:.3g}{end}"


if __name__ == "__main__":
    main()
