"""The plots of a report, as PNG bytes under their captions. Used by aggregate.py; what they show is in tables too."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.claims import Comparison, Family, Row
from common.results import Task
from common.tables import TITLES, Index, index

COLORS = (*plt.get_cmap("tab10").colors, *plt.get_cmap("tab20").colors[1::2])  # the strong ones first
DPI = 100


def png(figure) -> bytes:
    """The figure as a PNG, the same bytes for the same plot; closes it."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()


def panels(tasks: Sequence[Task], title, height: float = 3.4):
    """A figure with one panel a task."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(max(6.4, 4.6 * len(tasks)), height), squeeze=False)
    for task, ax in zip(tasks, axes[0]):
        ax.set_title(f"{title}{task.name}", fontsize=10)
        ax.grid(alpha=0.25)
    figure.set_layout_engine("constrained")
    return figure, axes[0]


def legend(figure, axes) -> None:
    """One for all panels, below them, where it hides nothing."""
    named = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    columns = int(figure.get_figwidth() / (0.5 + 0.075 * max(map(len, named))))  # of so many inches at this size
    where = dict(loc="outside lower center", ncols=min(4, max(1, columns)))
    figure.legend(named.values(), named, fontsize=9, frameon=False, **where)


def colors(tasks: Sequence[Task]) -> dict[str, tuple]:
    """One color an arm, the same in all plots."""
    arms = list(dict.fromkeys(arm for task in tasks for arm in task.arms))
    return {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(arms)}


def bars(ax, rows: dict[str, Row], color: dict[str, tuple], scale: float = 1.0) -> None:
    """One point an arm with its interval, the arms from top to bottom."""
    for i, (arm, row) in enumerate(rows.items()):
        if row.mean is not None:
            low, high = (row.mean if edge is None else edge for edge in (row.low, row.high))
            error = [[scale * (row.mean - low)], [scale * (high - row.mean)]]
            ax.errorbar(scale * row.mean, i, xerr=error, fmt="o", color=color[arm], capsize=3)
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.invert_yaxis()


# ---- the plots ------------------------------------------------------------------------------------------------------
def learning_curves(tasks: Sequence[Task]) -> bytes | None:
    """Accuracy of sampled completions by step: mean over seeds, the band from the lowest to the highest of them; None
    where nothing is sampled, or the metrics are not there."""
    figure, axes = panels(tasks, "training, ")
    drawn = False
    for task, ax in zip(tasks, axes):
        for arm, cells in task.arms.items():
            key = "charts/accuracy"
            runs = [{row["step"]: row[key] for row in cell.curves if key in row} for cell in cells.values()]
            steps = sorted(set.intersection(*map(set, runs)))
            if steps:
                y = np.array([[run[step] for step in steps] for run in runs])
                width = max(1, len(steps) // 12)
                # a running mean: each step is of some dozens of samples
                smooth = lambda row, width=width: np.convolve(
                    np.pad(row, (width // 2, width - 1 - width // 2), "edge"), np.full(width, 1 / width), "valid"
                )
                y = 100 * np.array([smooth(row) for row in y])
                ax.plot(steps, y.mean(0), lw=1.4, color=colors(tasks)[arm], label=arm)
                ax.fill_between(steps, y.min(0), y.max(0), alpha=0.15, color=colors(tasks)[arm], lw=0)
                drawn = True
        ax.set(xlabel="step", ylabel="accuracy of samples, %")
    if not drawn:
        plt.close(figure)
        return None
    legend(figure, axes)
    return png(figure)


def measure_plot(tasks: Sequence[Task], rows: Index, measure: str, label: str, scale: float) -> bytes | None:
    """A measure of every arm with its interval; None where no run has it."""
    if all(rows[task.name, arm, measure, "all"].mean is None for task in tasks for arm in task.arms):
        return None
    tall = max(len(task.arms) for task in tasks)
    figure, axes = panels(tasks, "", 1.4 + 0.32 * tall)
    for task, ax in zip(tasks, axes):
        bars(ax, {arm: rows[task.name, arm, measure, "all"] for arm in task.arms}, colors(tasks), scale)
        ax.set_xlabel(label)
        if measure != "delta_critique":
            ax.axvline(0, color="gray", lw=0.8)
    return png(figure)


def by_horizon(tasks: Sequence[Task], rows: Index) -> bytes:
    """Above: accuracy of revisions by horizon. Below: the share of first attempts that hold so many steps (math)."""
    figure, axes = plt.subplots(2, len(tasks), figsize=(max(6.4, 4.6 * len(tasks)), 6), squeeze=False)
    figure.set_layout_engine("constrained")
    for task, top, bottom in zip(tasks, *axes):
        groups = [group for group in task.first.groups if group.startswith("horizon ")]
        horizons = [int(group.partition(" ")[2]) for group in groups]
        base = task.first.base.get("by_horizon", {})
        share = [base.get(str(h), {}).get("accuracy_revised") for h in horizons]
        gray = dict(color="gray", ls="--", lw=1.2, label="untrained base")
        top.plot(horizons, [np.nan if v is None else 100 * v for v in share], **gray)
        if kept := (task.first.base.get("survival") or {}).get("all"):
            bottom.plot(range(1, len(kept) + 1), 100 * np.array(kept), **gray)
        for arm, cells in task.arms.items():
            some = [rows[task.name, arm, "revised", group] for group in groups]
            y = np.array([[np.nan if v is None else 100 * v for v in (r.mean, r.low, r.high)] for r in some])
            top.plot(horizons, y[:, 0], marker="o", ms=3, lw=1.2, color=colors(tasks)[arm], label=arm)
            top.fill_between(horizons, y[:, 1], y[:, 2], alpha=0.1, color=colors(tasks)[arm], lw=0)
            held = [v["all"] for cell in cells.values() if (v := cell.summary.get("survival"))]
            if held:
                curve = 100 * np.mean(held, axis=0)
                bottom.plot(range(1, len(curve) + 1), curve, marker="o", ms=3, lw=1.2, color=colors(tasks)[arm])
        top.set(title=task.name, xlabel="horizon (steps of the reference)", ylabel="revised, %", ylim=(-2, 102))
        bottom.set(xlabel="steps", ylabel="first attempts that hold, %", ylim=(-2, 102))
        for ax in (top, bottom):
            ax.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_visible(bool(bottom.lines))
    legend(figure, axes[0])
    return png(figure)


def comparison_panels(comparisons: Sequence[Comparison]):
    """A figure with one panel a task, and for each comparison its panel and its row; names stand at the left alone."""
    tasks = list(dict.fromkeys(c.task for c in comparisons))
    pairs = list(dict.fromkeys((c.arm, c.base) for c in comparisons))
    names = [f"{arm} − {base}" for arm, base in pairs]
    width = 0.085 * max(map(len, names)) + 2.9 * max(2, len(tasks))
    figure, axes = plt.subplots(1, len(tasks), figsize=(width, 1.4 + 0.34 * len(pairs)), squeeze=False, sharey=True)
    figure.set_layout_engine("constrained")
    axes[0][0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    for task, ax in zip(tasks, axes[0]):
        ax.set_title(task, fontsize=10)
        ax.grid(alpha=0.25)
    at = dict(zip(tasks, axes[0]))
    return figure, axes[0], [(c, at[c.task], pairs.index((c.arm, c.base))) for c in comparisons]


def forest(comparisons: Sequence[Comparison], family: Family) -> bytes:
    """The family's comparisons: difference and interval, the bootstrap's percentiles behind it, the margin."""
    figure, axes, places = comparison_panels(comparisons)
    looks = {"supported": ("tab:green", "o"), "not supported": ("tab:red", "X"), "undecided": ("tab:gray", "D")}
    for c, ax, i in places:
        tone, marker = looks[c.verdict]
        if c.found:
            ax.plot(c.percentile, (i, i), color="lightgray", lw=7, solid_capstyle="butt")
            ax.plot(c.found.interval, (i, i), color=tone, lw=1.6, marker="|", ms=8)
        ax.plot(c.difference, i, marker, color=tone, ms=6)
    for ax in axes:
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(family.margin, color="black", lw=0.6, ls=":")
        ax.set_xlabel("points")
    marks = [plt.Line2D([], [], color=tone, marker=mark, lw=1.6, label=name) for name, (tone, mark) in looks.items()]
    figure.legend(handles=marks, loc="outside lower right", ncols=3, fontsize=9, frameon=False)
    return png(figure)


def improvement_plot(comparisons: Sequence[Comparison]) -> bytes:
    """Probability of improvement of each comparison of the family."""
    figure, axes, places = comparison_panels(comparisons)
    for c, ax, i in places:
        poi = c.improvement
        if poi["low"] is not None:
            ax.plot((poi["low"], poi["high"]), (i, i), color="tab:blue", lw=1.6, marker="|", ms=8)
        ax.plot(poi["share"], i, "o", color="tab:blue")
    for ax in axes:
        ax.axvline(0.5, color="black", lw=0.8)
        ax.set(xlim=(-0.03, 1.03), xlabel="share of pairs")
    return png(figure)


def all_plots(tasks: list[Task], rows: list[Row], comparisons: list[Comparison], family: Family) -> dict[str, bytes]:
    """{caption: PNG}, in the order of the report; a plot that would be empty is not there."""
    at = index(rows)
    plots = {
        f"{family.title}: difference in points of {TITLES[family.measure]} with its 95 % interval over seeds and"
        " problems, each task on its own scale; broad: the bootstrap's percentiles; dotted: the smallest advantage that"
        " matters":
            comparisons and forest(comparisons, family),
        "Probability of improvement: of all pairs of runs, the share in which the first method's is better, with its"
        " 95 % interval": comparisons and improvement_plot(comparisons),
        "delta_critique: revisions right minus flawed attempts right, points, with 95 % intervals":
            measure_plot(tasks, at, "delta_critique", "points", 100),
        "Accuracy of revisions by horizon with 95 % intervals, and survival of first attempts": by_horizon(tasks, at),
        "Credit: AUC of the flagged step over its null, with 95 % intervals; 0 is none":
            measure_plot(tasks, at, "credit_excess", "excess of the AUC", 1),
        "Learning curves: of methods that sample, accuracy of sampled completions (running mean); the band goes"
        " from the lowest to the highest seed":
            learning_curves(tasks),
    }  # fmt: skip
    return {caption: image for caption, image in plots.items() if image}
