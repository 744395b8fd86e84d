"""The work that is compared between engines, and how it is measured: what every one of them has to do alike.

Shapes, first weights, token ids, reward and AdamW's constants; then a stopwatch and the figures of a run. NumPy only,
for other engines know no JAX. Token i is the word `ti`, and the end token lies outside the vocabulary, so that nothing
ends early. BENCH_PROMPT_LEN=512 is the work with long prompts; with BENCH_WAIT_QUIET=S every step waits, at most S
seconds, for an idle machine. What other processes use is read from /proc/stat: Linux only.
"""

import os
import pathlib
import resource
import time

import numpy as np

PROMPTS, GROUP = 8, 8  # of a GRPO step; SFT and DPO take half as many sequences: 32, or 16 pairs
PROMPT_TOKENS, NEW_TOKENS = int(os.environ.get("BENCH_PROMPT_LEN", 64)), 128
SIZES = {
    "nano": dict(vocab_size=512, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=512),
    "small": dict(vocab_size=4096, d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1536),
}  # Qwen3's architecture, embeddings tied, float32
ROPE_THETA, NORM_EPS = 1e6, 1e-6
ADAMW = dict(learning_rate=3e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)  # after clipping the norm to 1
TEMPERATURE, CLIP, DPO_BETA = 1.0, 0.2, 0.1
QUIET_CORES = 0.15  # a step is quiet if all other processes used less than this many cores meanwhile
_SEED, _INIT_STD = 1234, 0.02


# ---- the work -----------------------------------------------------------------------------------------------------
def initial_weights(size: str) -> dict[str, np.ndarray]:
    """{Hugging Face's name: float32}: matrices [out, in] normal with deviation 0.02, norms 1. All come from one stream
    of random numbers: the order of the names is part of the work."""
    V, D, L, N, K, H, F = SIZES[size].values()
    layer = {
        "input_layernorm": (D,), "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H), "self_attn.q_norm": (H,),
        "self_attn.k_norm": (H,), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }  # fmt: skip
    shapes = {"embed_tokens": (V, D)} | {f"layers.{i}.{name}": layer[name] for i in range(L) for name in layer}
    rng, norm = np.random.default_rng(_SEED), lambda shape: np.ones(shape, np.float32)
    matrix = lambda shape: rng.standard_normal(shape, np.float32) * _INIT_STD
    every = (shapes | {"norm": (D,)}).items()
    return {f"model.{name}.weight": (matrix if len(shape) == 2 else norm)(shape) for name, shape in every}


def step_ids(task: str, step: int, vocab: int, rows: int, P: int, T: int) -> list[np.ndarray]:
    """The random token ids of one step: of GRPO [prompts [rows, P]], of SFT [sequences [rows, P + T]], of DPO [prompts
    [rows, P], chosen [rows, T], rejected [rows, T]], whose answers end in id 1. No id is below 3 but that."""
    shapes = {"sft": [(rows, P + T)], "dpo": [(rows, P), (rows, T), (rows, T)]}.get(task, [(rows, P)])
    rng = np.random.default_rng((_SEED, {"sft": 11, "dpo": 13}.get(task, 7), step))
    ids = [rng.integers(3, vocab, shape) for shape in shapes]
    for answers in ids[1:]:
        answers[:, -1] = 1
    return ids


def to_text(ids) -> str:
    """[17, 4] -> "t17 t4"."""
    return " ".join(f"t{i}" for i in ids)


def reward(text: str) -> float:
    """How often the digit 7 is written in a completion: free, and hardly ever the same for a whole group."""
    return float(text.count("7"))


# ---- what is measured ---------------------------------------------------------------------------------------------
def now() -> np.ndarray:
    """[3] seconds: of the clock, of this process's CPU, of all CPUs while they were busy."""
    user, nice, system, _, _, irq, soft = map(int, pathlib.Path("/proc/stat").read_text().split()[1:8])
    busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    return np.array([time.perf_counter(), time.process_time(), busy])


class Stopwatch:
    """Seconds of the clock, of this process's CPU and of other processes' CPU: a row for every step, {part: rows}. The
    part `step` is all of a step, until the next one starts."""

    def __init__(self):
        self.rows, self.began = {}, None

    def start(self) -> None:
        """A step begins, and the one before ends; between them one may wait for an idle machine."""
        if self.began is not None:
            self.mark("step", self.began)
        deadline = time.perf_counter() + float(os.environ.get("BENCH_WAIT_QUIET", 0))
        while time.perf_counter() < deadline:
            before = now()
            time.sleep(1.0)
            wall, own, busy = now() - before
            if busy - own < QUIET_CORES * wall:
                break
        self.began = self.last = now()

    def mark(self, part: str, since: np.ndarray | None = None) -> None:
        """`part` ends; it began at the last mark, or with the step."""
        wall, own, busy = now() - (self.last if since is None else since)
        self.rows.setdefault(part, []).append((wall, own, max(0.0, busy - own)))
        self.last = now()


def report(watch: Stopwatch, warmup: int, new_tokens: int, trained_tokens: int) -> dict:
    """The figures of a run whose steps make and train on so many tokens: medians over the steps after `warmup`, over
    the quiet ones alone if there are at least three. Generation is sampling and scoring; where nothing is sampled, a
    step is training as a whole."""
    rows = {part: np.array(rows) for part, rows in watch.rows.items()}  # [steps, 3]
    rows["train"] = rows["step"]
    if "rollout" in rows:
        rows |= {"gen": rows["rollout"] + rows["score"], "train": rows["update"]}
    wall, load = rows["step"][:, 0], rows["step"][:, 2] / rows["step"][:, 0]
    quiet = [i for i in range(warmup, len(wall)) if load[i] < QUIET_CORES]
    used = quiet if len(quiet) >= 3 else list(range(warmup, len(wall)))
    stats = {"median": np.median, "min": np.min, "max": np.max}
    wall_s = {part: {k: round(float(f(a[used, 0])), 4) for k, f in stats.items()} for part, a in rows.items()}
    step_s = wall_s["step"]["median"]
    return {
        "gen_tok_s": round(new_tokens / wall_s["gen"]["median"], 1) if "gen" in rows else None,
        "train_tok_s": round(trained_tokens / wall_s["train"]["median"], 1),
        "step_s": step_s,
        "compile_s": round(max(0.0, wall[:warmup].sum() - warmup * step_s), 3),  # beyond as many later steps
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "wall_s": wall_s,
        "cores_used": {part: round(a[used, 1].sum() / a[used, 0].sum(), 2) for part, a in rows.items()},
        "steps_used": len(used),
        "steps_quiet": len(quiet),
        "others_cores": round(load[used].mean(), 3),
        "warmup_others_cores": round(load[:warmup].mean(), 3) if warmup else None,
    }
