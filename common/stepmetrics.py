"""What a line of log says beside losses: the clock, and what the rollout looks like. Used by all scripts."""

import time

import numpy as np

from common.answers import has_unread
from common.replay import Quadruple
from common.report import PROCESS_START, peak_memory
from common.rewards import format_valid


class StepClock:
    """Wall time of the parts of a step; the first step holds the compilation and stays out of rates and medians."""

    def __init__(self):
        self.times: dict[str, list[float]] = {"step": []}

    @property
    def steps(self) -> int:
        return len(self.times["step"])

    def start(self) -> None:
        self.began = self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """End of the part `name`; `update` ends the step."""
        now = time.perf_counter()
        self.times.setdefault(name, []).append(now - self.last)
        self.last = now
        if name == "update":
            self.times["step"].append(now - self.began)

    def metrics(self, completions: int) -> dict[str, float]:
        """time/*, memory/*, and charts/SPS (completions a second) of the last step; time/compile in place of it in the
        first."""
        parts = {f"time/{name}": t[-1] for name, t in self.times.items()}
        first = {"time/compile": self.times["step"][0]} if self.steps == 1 else {}
        rate = {"charts/SPS": completions / self.times["step"][-1]} if self.steps > 1 else {}
        return {**parts, **first, **rate, **{f"memory/{kind}": mib for kind, mib in peak_memory().items()}}

    def summary(self) -> dict[str, float]:
        """Medians over the steps after the first, the first, and the whole process, imports included, in seconds."""
        steady = {name: float(np.median(t[1:] or t or [0.0])) for name, t in self.times.items()}
        return {**steady, "first_step": (self.times["step"] or [0.0])[0], "total": time.time() - PROCESS_START}


def rollout_metrics(
    out: dict[str, np.ndarray], texts: list[str], reward_BG: np.ndarray, quads: list[Quadruple]
) -> dict[str, float]:
    """rollout/*: completion length, share cut off, share of groups without variance, share well-formed, share with an
    answer that was not read (math alone), completions that the harness failed to score (their reward is NaN)."""
    G, unscored_BG = reward_BG.shape[1], np.isnan(reward_BG)
    domains = [quads[m // G].meta["domain"] for m in range(len(texts))]
    well_formed = [format_valid(text, domain) for text, domain in zip(texts, domains)]
    unread = [has_unread(text) for text, domain in zip(texts, domains) if domain == "math"]
    spread_B = np.where(unscored_BG, -np.inf, reward_BG).max(1) - np.where(unscored_BG, np.inf, reward_BG).min(1)
    return {
        "rollout/len_mean": float(out["len_M"].mean()), "rollout/truncated_frac": float(out["truncated_M"].mean()),
        "rollout/zero_std_frac": float((spread_B <= 0).mean()), "rollout/format_frac": float(np.mean(well_formed)),
        "rollout/harness_errors": float(unscored_BG.sum()),
        **({"rollout/unread_frac": float(np.mean(unread))} if unread else {}),
    }  # fmt: skip
