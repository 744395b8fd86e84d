"""The tables of docs/results.md: one row per method and seed from the result.json files of one task, as Markdown.

    for s in 0 1 2; do for m in b0_sft b1_dpo b2_grpo b3_grpo_verifier b4_grpo_critique b5_cts; do
        python $m.py --seed $s; done; done
    python docs/results_table.py runs

Runs that differ in anything that the fairness fingerprint covers do not belong in one table: none is printed, and the
fields that differ are named (exit code 2).
"""

import json
import pathlib
import sys
from collections import defaultdict

COLUMNS = ("revised", "delta", "wrong→right", "right→wrong", "first attempt", "credit AUC")
KEYS = ("accuracy_revised", "delta_critique", "wrong_to_right", "right_to_wrong", "accuracy", "credit_auc")
HORIZONS = {"h≤2": range(3), "h=3": range(3, 4), "h=4": range(4, 5), "h=5": range(5, 6), "h≥6": range(6, 1000)}


def cell(key: str, value: float | None) -> str:
    """An AUC as a number, the rest as percentages; a dash where there is nothing to measure."""
    return "–" if value is None else f"{value:.3f}" if key == "credit_auc" else f"{100 * value:.1f}"


def by_horizon(summary: dict, horizons: range) -> float | None:
    """Revised accuracy over the test problems of some horizons; None where there are none."""
    rows = [r for h, r in summary["by_horizon"].items() if int(h) in horizons]
    return sum(r["n"] * r["accuracy_revised"] for r in rows) / sum(r["n"] for r in rows) if rows else None


def row(name: str, summary: dict) -> str:
    """One line of the table."""
    cells = [cell(key, summary.get(key)) for key in KEYS]
    cells += [cell("h", by_horizon(summary, h)) for h in HORIZONS.values()]
    return f"| {name} | {' | '.join(cells)} |"


def table(results: list[dict]) -> str:
    """Markdown: the base, every run, and each method's mean of several; ValueError if the fingerprints differ."""
    first = results[0]["fingerprint"]
    for result in results:
        differ = [k for k in first if k != "digest" and result["fingerprint"].get(k) != first[k]]
        if differ:
            raise ValueError(f"{result['method']} seed {result['args']['seed']} differs in {', '.join(differ)}")
    head = ("method, seed", *COLUMNS, *HORIZONS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines.append(row("base", {**results[0]["base"], "credit_auc": None}))
    methods = defaultdict(list)
    for result in sorted(results, key=lambda r: (r["method"], r["args"]["seed"])):
        methods[result["method"]].append(result["summary"])
        lines.append(row(f"{result['method'][:2].upper()}, {result['args']['seed']}", result["summary"]))
    average = lambda values: None if None in values else sum(values) / len(values)
    for method, summaries in methods.items():
        if len(summaries) == 1:
            continue
        whole = {key: average([s.get(key) for s in summaries]) for key in KEYS}
        n = {h: {"n": s["n"], "accuracy_revised": average([t["by_horizon"][h]["accuracy_revised"] for t in summaries])}
             for h, s in summaries[0]["by_horizon"].items()}  # fmt: skip
        lines.append(row(f"**{method[:2].upper()}**, mean of {len(summaries)}", {**whole, "by_horizon": n}))
    return "\n".join(lines)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("b?_*/result.json"))]
    try:
        if not found:
            raise ValueError(f"there is no result.json in {folder}/b*/; run the scripts first")
        print(f"{table(found)}\n\n{len(found)} runs, fingerprint {found[0]['fingerprint']['digest'][:16]}")
    except ValueError as e:
        print(f"error: no table, for {e}", file=sys.stderr)
        sys.exit(2)
