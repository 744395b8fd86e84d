"""The tables of a report from rows and comparisons, and how they are written: Markdown, LaTeX, CSV. Used by figures and
aggregate.py; measures nothing."""

import csv
import io
import re
from collections import defaultdict

from common.claims import ALPHA, RATES, SCORED, Absent, Comparison, Family, Row, largest_effect
from common.page import Table
from common.results import CREDIT, Task
from common.slips import KINDS

NOTHING = "n/a"
TITLES = {
    "revised": "revised", "attempt": "first attempt", "delta_critique": "delta_critique",
    "wrong_to_right": "wrong→right", "right_to_wrong": "right→wrong", "format": "well-formed", "tokens": "tokens",
    "credit_auc": "AUC as it is", "credit_matched": "AUC matched", "credit_null": "its null",
    "credit_excess": "excess", "flip_gain": "flip gain, nats", "value_correlation": "value correlation",
    "value_excess": "value excess", "credit_temperature": "T*",
    "slip": "planted slips", "arithmetic": "other arithmetic", "copying": "copying", "form": "form",
}  # fmt: skip
BASE_KEYS = {"revised": "accuracy_revised", "attempt": "accuracy", "delta_critique": "delta_critique",
             "wrong_to_right": "wrong_to_right", "right_to_wrong": "right_to_wrong", "format": "format_frac",
             "tokens": "tokens_mean"}  # fmt: skip
BASE_GROUPS = {"horizon": "by_horizon", "edit": "by_edit_distance", "tag": "by_tag"}
BASE = "untrained base"
FEW_PROBLEMS = 100  # a measure of fewer says of how many it is
Index = dict[tuple[str, str, str, str], Row]  # by task, arm, measure, group


def index(rows: list[Row]) -> Index:
    """Rows by what they are about."""
    return {(row.task, row.arm, row.measure, row.group): row for row in rows}


# ---- numbers --------------------------------------------------------------------------------------------------------
def number(measure: str, value: float | None, sign: bool = False) -> str:
    """Rates in percent, tokens with one digit, the rest with three; n/a where there is nothing.

    >>> number("revised", 0.4321), number("credit_excess", 0.0531, sign=True), number("revised", None)
    ('43.2', '+0.053', 'n/a')
    """
    if value is None:
        return NOTHING
    value, digits = (100 * value, 1) if measure in RATES else (value, 1 if measure == "tokens" else 3)
    value = round(value, digits) + 0.0  # no -0.0
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def with_interval(row: Row | None) -> str:
    """A mean and half the length of its interval; a mean alone where there is no interval, or where all runs and
    problems are the same, which says nothing of others."""
    if row is None or row.mean is None:
        return NOTHING
    text = number(row.measure, row.mean)
    return text if row.low in (None, row.high) else f"{text} ± {number(row.measure, (row.high - row.low) / 2)}"


def with_effect(row: Row | None) -> str:
    """A mean, and behind it the difference from the base arm with half the length of its interval."""
    text = with_interval(row)
    if row is None or row.mean is None or row.difference is None:
        return text
    half = f" ± {number(row.measure, row.effect.half)}" if row.effect and row.effect.se else ""
    return f"{number(row.measure, row.mean)} ({number(row.measure, row.difference, sign=True)}{half})"


def p_value(p: float | None) -> str:
    return NOTHING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


# ---- tables ---------------------------------------------------------------------------------------------------------
def seeds_of(task: Task, arm: str) -> str:
    """The seeds that an arm has, and which of the others it lacks."""
    lacks = sorted(seed for (name, seed) in task.missing if name == arm and seed >= 0)
    text = str(len(task.arms.get(arm, {})))
    return text + (f" (without {', '.join(map(str, lacks))})" if lacks else "")


def what_is_missing(task: Task) -> list[str]:
    """A line for each reason and set of seeds, with the arms."""
    seeds, arms, word = defaultdict(list), defaultdict(list), {0: "", 1: " seed "}
    for (arm, seed), why in sorted(task.missing.items()):
        seeds[arm, why] += [str(seed)] * (seed >= 0)
    for (arm, why), some in seeds.items():
        arms[f"{word.get(len(some), ' seeds ')}{', '.join(some)}: {why}"].append(arm)
    return [f"{', '.join(some)}{which}" for which, some in arms.items()]


def main_table(task: Task, rows: Index) -> Table:
    """Every arm and the untrained base: the rates, and what a million trained tokens win."""
    base = task.first.base
    first = [BASE, NOTHING, *(number(m, base.get(BASE_KEYS[m])) for m in SCORED), NOTHING, NOTHING]
    lines = []
    for arm in task.arms:
        cells = [rows[task.name, arm, m, "all"] for m in SCORED]
        rate, tokens = per_token(task, arm, cells[0].mean)
        sd = NOTHING if cells[0].sd is None else f"{100 * cells[0].sd:.1f}"
        lines.append([arm, seeds_of(task, arm), *map(with_interval, cells), sd, rate + tokens])
    head = ["method", "seeds", *(TITLES[m] for m in SCORED), "SD", "points per M tokens"]
    for arm in sorted({arm for arm, seed in task.missing if arm not in task.arms and seed >= 0}):
        lines.append([arm, seeds_of(task, arm), *[NOTHING] * (len(head) - 2)])
    note = (
        f"Percent of {len(task.first.ids):,} test problems, mean over seeds ± half of the 95 % interval over seeds and"
        " problems. Revised: revisions, written behind a given flawed attempt and its critique, that are right; first"
        " attempt: right from the problem alone; well-formed: revisions that commit to one answer, or are a program."
        " SD: of the runs' revised accuracy. Last column: points of revised accuracy won over the untrained base for"
        " each million tokens that training computed, prompts and padding included (b0_sft packs and has none)."
    )
    if all(rows[task.name, arm, "right_to_wrong", "all"].mean is None for arm in task.arms):
        note += " No given attempt is right here, so delta_critique and wrong→right are what revised is."
    scored = ("revised", "attempt", "delta_critique")
    measured = lambda arm: min(rows[task.name, arm, m, "all"].problems for m in scored)
    if fewer := [f"{arm} {n:,}" for arm in task.arms if (n := measured(arm)) < len(task.first.ids)]:
        note += f" A problem without a score in one run is left out of its arm; problems left: {', '.join(fewer)}."
    note += f" Incomplete: {'; '.join(what_is_missing(task))}." if task.missing else ""
    return Table(f"{task.name}: accuracy", head, [first, *lines], note)


def per_token(task: Task, arm: str, revised: float | None) -> tuple[str, str]:
    """(points won for each million trained tokens, a mark where only the completions' tokens are known)."""
    before, counted = task.first.base.get("accuracy_revised"), []
    for cell in task.arms[arm].values():
        counted.append(max((row["charts/tokens"] for row in cell.curves if "charts/tokens" in row), default=None))
    if revised is None or before is None:
        return NOTHING, ""
    mark = "" if None not in counted else " (completions alone)"
    tokens = task.first.fingerprint.get("training_tokens") if mark else sum(counted) / len(counted)
    return (f"{100 * (revised - before) / (tokens / 1e6):+.1f}", mark) if tokens else (NOTHING, "")


def family_table(comparisons: list[Comparison], family: Family, absent: Absent) -> Table:
    """What was declared: effect, interval, p, what could have been detected."""
    lines, several = [], len({c.task for c in comparisons} | {task for task, *_ in absent}) > 1
    signed, most = lambda value: f"{round(value, 1) + 0.0:+.1f}", largest_effect(family)
    for c in comparisons:
        found, mark = c.found, " (primary)" if (c.arm, c.base) == family.comparisons[0] else ""
        near = lambda pair: NOTHING if pair is None else " to ".join(map(signed, pair))
        open_ = c.verdict == "undecided"
        least = lambda value: f"{value:.1f}" if value <= most else f">{most:.0f}"
        detect = [NOTHING] * 2 if found is None else [least(c.detectable), shares(c)]
        needed = NOTHING if found is None else "more problems" if c.seeds_needed is None else str(
            max(c.seeds_needed, len(c.seeds) + 1))  # fmt: skip
        poi = c.improvement
        chance = f"{poi['share']:.2f}" + ("" if poi["low"] is None else f" [{poi['low']:.2f}, {poi['high']:.2f}]")
        lines.append([
            f"{c.task}: " * several + f"{c.arm} − {c.base}{mark}",
            signed(c.difference), near(found and found.interval), p_value(c.p_holm), c.verdict,
            p_value(found and found.p), near(c.percentile),
            *(detect if open_ else ["–"] * 2), needed if open_ else "–", p_value(c.wilcoxon),
            " ".join(p_value(p) for p in c.mcnemar.values()), chance,
        ])  # fmt: skip
    head = ["comparison", "points", "95 % interval", "p, Holm", "verdict", "p", "percentiles", "MDE",
            "of it seeds / problems / either", "seeds to find it", "Wilcoxon", "McNemar by seed",
            "P(improvement)"]  # fmt: skip
    n, margin = comparisons[0].among, f"{family.margin:g} point{'s' * (family.margin != 1)}"
    note = (
        f"Points of {TITLES[family.measure]} on the same seeds and problems; t over seeds and problems. p, Holm: after"
        f" Holm over {n} comparison{'s' * (n > 1)}; interval, p, Wilcoxon and McNemar are of a comparison by itself,"
        f" and the last two know problems alone. Verdict: supported, better and p, Holm at most {ALPHA:g}; not"
        f" supported, worse in that sense, or the interval ends below {margin}, the smallest advantage that matters;"
        " else undecided. The answer is that of the primary comparison. MDE: the true effect that this test, at 5 %"
        " divided by the number of comparisons, finds in 80 % of repetitions, beside rows that decide nothing; beside"
        " it the shares of the variance that more seeds, more problems, and either of them would shrink. Seeds to find"
        " it: what was seen, or the margin; an interval may come to end below the margin sooner. Percentiles: of the"
        " bootstrap over seeds and problems. P(improvement): of all pairs of runs, the share in which the first is"
        f" better. Family {family.digest[:16]} ({family.source})."
    )
    if family.source == "default":
        note += f" No family was declared: every arm is compared with {family.comparisons[0][1]}."
    if absent:
        reasons = (f"{task}, {arm} − {base}: {why}" for (task, arm, base), why in absent.items())
        note += f" Not compared, and counted as showing nothing: {'; '.join(reasons)}."
    return Table(family.title, head, lines, note)


def shares(c: Comparison) -> str:
    """Shares of the variance of an effect that more seeds, more problems, and either would shrink."""
    total = sum(c.found.parts)
    return " / ".join(f"{100 * part / total:.0f} %" for part in c.found.parts) if total else NOTHING


def base_value(task: Task, measure: str, group: str) -> float | None:
    """The untrained base's accuracy in a group of problems; None where its report has none.

    Groups of edit distance are called "edit 3-5" and "edit 11+" here, "<=5" and ">10" there.
    """
    kind, _, name = group.partition(" ")
    if kind == "edit":
        low, _, high = name.partition("-")
        name = f"<={high}" if high else f">{int(low.rstrip('+')) - 1}"
    return task.first.base.get(BASE_GROUPS[kind], {}).get(name, {}).get(BASE_KEYS[measure])


def group_table(task: Task, rows: Index, kind: str, measure: str, base: str | None) -> Table:
    """An accuracy by horizon, edit distance or tag."""
    groups = [group for group in task.first.groups if group.startswith(f"{kind} ")]
    counts = [int(task.first.groups[group].sum()) for group in groups]
    name = {"horizon": "h=", "edit": "", "tag": ""}[kind]
    head = ["method", *(f"{name}{group.partition(' ')[2]} (n={n})" for group, n in zip(groups, counts))]
    lines = [[BASE, *(number(measure, base_value(task, measure, group)) for group in groups)]]
    for arm in task.arms:
        lines.append([arm, *(with_effect(rows.get((task.name, arm, measure, group))) for group in groups)])
    what = {"horizon": "horizon", "edit": "edit distance", "tag": "error tag"}[kind]
    of = {"horizon": "h: steps of the reference", "edit": "By words to be edited between y0 and y1",
          "tag": "By the kind of the given attempt's error"}[kind]  # fmt: skip
    beside = f"; in brackets the difference from {base} ± half of its interval, not adjusted" if base else ""
    return Table(f"{task.name}: {TITLES[measure]} by {what}", head, lines, f"{of}. Percent{beside}.")


def errors_table(task: Task, rows: Index, base: str | None) -> Table | None:
    """Errors of first attempts by kind of step; None where no slips are planted."""
    known = [kind for kind in KINDS if any(rows[task.name, arm, kind, "all"].mean is not None for arm in task.arms)]
    if not known:
        return None
    lines = [[arm, *(with_effect(rows[task.name, arm, kind, "all"]) for kind in known)] for arm in task.arms]
    beside = f"; in brackets the difference from {base} ± half of its interval, not adjusted" if base else ""
    note = f"Percent of an attempt's steps, slips of its planted ones, mean over attempts{beside}."
    return Table(f"{task.name}: errors of first attempts", ["method", *(TITLES[kind] for kind in known)], lines, note)


def credit_table(task: Task, rows: Index) -> Table | None:
    """The measures of credit beside their nulls; None where no run has any."""
    known = [m for m in CREDIT if any(rows[task.name, arm, m, "all"].mean is not None for arm in task.arms)]
    if not known:
        return None
    of = lambda row: f" (n={row.problems})" if row.mean is not None and row.problems < FEW_PROBLEMS else ""
    cells = lambda arm: (rows[task.name, arm, m, "all"] for m in known)
    lines = [[arm, *(with_interval(row) + of(row) for row in cells(arm))] for arm in task.arms]
    note = (
        "Mean over seeds ± half of the 95 % interval over seeds and problems. AUC: how well the fall of a flawed"
        " attempt's tokens, in log probability from the base to the policy, finds its flagged step. Excess and value"
        f" excess are over their nulls: 0 is no credit. n: problems that have the measure in every run, where below"
        f" {FEW_PROBLEMS}. docs/metrics.md of the repository defines each."
    )
    return Table(f"{task.name}: credit", ["method", *(TITLES[m] for m in known)], lines, note)


def all_tables(
    tasks: list[Task], rows: list[Row], comparisons: list[Comparison], family: Family, base: str | None, absent: Absent
) -> list[Table]:
    """Those of a report, in order."""
    found, at = [family_table(comparisons, family, absent)] if comparisons else [], index(rows)
    for task in tasks:
        found.append(main_table(task, at))
        found += [group_table(task, at, "horizon", measure, base) for measure in ("revised", "attempt")]
        found += [group_table(task, at, kind, "revised", base) for kind in ("edit", "tag")]
        found += [table for table in (errors_table(task, at, base), credit_table(task, at)) if table]
    return [table for table in found if len(table.head) > 1]


# ---- files ----------------------------------------------------------------------------------------------------------
def as_markdown(title: str, sentence: str, tables: list[Table]) -> str:
    """table.md."""
    clean = lambda cell: cell.replace("|", "\\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(map(clean, cells))} |"
    parts = [f"# {title}\n\n{sentence}\n"]
    for table in tables:
        rule = "|---" * len(table.head) + "|"
        parts.append("\n".join([f"## {table.title}\n", line(table.head), rule, *map(line, table.rows)]))
        parts.append(f"{table.note}\n" if table.note else "")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def as_latex(tables: list[Table]) -> str:
    """table.tex: a tabular of each table, for \\input."""
    special = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "→": r"$\to$", "±": r"$\pm$",
        "−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "≤": r"$\le$",
    }  # fmt: skip
    clean = lambda text: re.sub("|".join(map(re.escape, special)), lambda hit: special[hit[0]], text)
    line = lambda cells: " & ".join(map(clean, cells)) + r" \\"
    parts = []
    for table in tables:
        columns = "l" + "r" * (len(table.head) - 1)
        rows = [r"\hline", line(table.head), r"\hline", *map(line, table.rows), r"\hline"]
        comments = f"% {table.title}\n% {table.note}"
        parts.append(f"{comments}\n\\begin{{tabular}}{{{columns}}}\n" + "\n".join(rows) + "\n\\end{tabular}\n")
    return "\n".join(parts)


def as_csv(rows: list[Row]) -> str:
    """table.csv: every measure, arm and group a line, numbers in full; empty where there is none."""
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["task", "method", "measure", "group", "seeds", "problems", "mean", "sd_of_runs", "low", "high",
                  "difference", "difference_low", "difference_high", "p", "detectable"])  # fmt: skip
    for row in rows:
        against = row.against
        least = row.effect.detectable if row.effect else None
        numbers = [row.mean, row.sd, row.low, row.high, *against.values(), least]
        cells = ["" if v is None else repr(v) for v in numbers]
        out.writerow([row.task, row.arm, row.measure, row.group, row.seeds, row.problems, *cells])
    return text.getvalue()
