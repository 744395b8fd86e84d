"""What a CTS term does to the policy by itself: a few updates from the base with nothing else, then first attempts,
error rates by kind of step, and how likely y1 has become. Prints a Markdown table.

    python benchmarks/probe.py --task fixtures_rare        (about 20 minutes on 2 CPU cores)
"""

import dataclasses
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import b5_cts as b5
import cts_common as cts
from common.slips import PLANTED, step_kinds

MICRO = 8  # attempts whose gradient is computed at once
KINDS = ("slip", "arithmetic", "copying", "form")
ARMS = {  # flags of b5 and the term that is trained
    "ref_only": ("align", dict(target="ref_only")),
    "energy": ("align", dict(target="energy")),
    "shuffled_locus": ("align", dict(target="shuffled_locus")),
    "random": ("align", dict(target="random")),
    "all_steps": ("align", dict(target="all_steps")),
    "hindsight": ("align", dict(target="hindsight")),
    "ref_only unheld": ("align", dict(target="ref_only", hold=0.0)),
    "energy unheld": ("align", dict(target="energy", hold=0.0)),
    "energy held 1": ("align", dict(target="energy", hold=1.0)),
    "energy eta 0.5": ("align", dict(target="energy", edit_eta=0.5)),
    "energy middle layer": ("align", dict(target="energy", align_layer=2)),
    "energy revise prompt": ("align", dict(target="energy", align_reading="revise")),
    "ref_only middle layer": ("align", dict(target="ref_only", align_layer=2)),
    "ref_only revise prompt": ("align", dict(target="ref_only", align_reading="revise")),
    "decode": ("decode", {}),
}


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "fixtures_long"
    """a task whose base has planted slips: fixtures_long or fixtures_rare"""
    model: str = "nano"
    """where all arms start from: nano or a checkpoint"""
    replay: str | None = None
    """folder with {train,val,test}.jsonl; none = data/replay/<task>"""
    arms: str = ", ".join(ARMS)
    """which arms, with commas between them"""
    updates: tuple[int, ...] = (5, 10, 20)
    """after how many updates there is a measurement"""
    rows: int = 32
    """attempts of an update, a multiple of 8"""
    learning_rate: float = 1e-3
    """Adam, constant"""
    problems: int = 320
    """test problems that are measured"""
    out_dir: str = "runs"
    """folder of the bases and the fitted critic"""


class Probe:
    def __init__(self, args: Args):
        self.args, self.mesh = args, cts.make_mesh("auto")
        self.replay = cts.load_replay(args.task, args.replay, None)
        load = cts.load_model(args.model, args.task, self.replay, args.out_dir, self.mesh)
        self.cfg, self.base, self.tokenizer, self.cache = load
        self.shapes = cts.fixed_shapes(self.tokenizer, self.replay, 1024, cts.TASKS[args.task].max_new_tokens)
        self.widths = cts.update_widths(self.tokenizer, self.replay["train"], self.shapes)
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(self.cfg, nnx.Rngs(0))))
        self.dtype = cts.pick_dtype("auto")
        made = (self.graphdef, self.tokenizer, self.replay["test"], self.shapes, self.mesh, self.dtype, args.problems)
        self.evaluator = cts.Evaluator(*made)
        self.critic_def, self.critic = nnx.split(b5.Critic(self.cfg.d_model, nnx.Rngs(cts.STREAM_INIT)), nnx.Param)
        self.fitted: dict[tuple, nnx.State] = {}

        @functools.partial(jax.jit, static_argnames="prompt")
        def logp(params, batch, prompt):
            model = nnx.merge(self.graphdef, params)
            (states,) = model([cts.Reading(batch[prompt], batch[f"{prompt}_len"], [batch["y1"]])], self.dtype)
            logp_BT, _ = cts.token_logp(states.completions[0], batch["y1"], model.head_VD())
            return (logp_BT * batch["y1_tokens"]).sum(-1)

        self.logp = logp

    def pack(self, quads: list[cts.Quadruple], rows, flags: b5.Args) -> dict[str, np.ndarray]:
        """What a term reads of `quads`, which stand in the `rows` of the replay."""
        revise = cts.pack_revise(self.tokenizer, quads, self.shapes)
        return b5.pack_terms(self.tokenizer, quads, rows, self.shapes, revise, flags)

    def fit(self, flags: b5.Args):
        """The critic fitted on this base; what it can do is printed."""
        made_by = flags.energy_fit, flags.align_reading, flags.align_layer
        if made_by not in self.fitted:
            read = jax.jit(lambda batch: b5.read_base(nnx.merge(self.graphdef, self.base), batch, self.dtype, flags))
            made = (self.critic_def, self.critic, lambda rows: cts.fetch(read(rows)), self.tokenizer, self.replay)
            leaves, about = cts.unpack_arrays(b5.fit_on_base(*made, self.shapes, self.args.rows, flags))
            print({name: {k: round(v, 3) for k, v in found.items()} for name, found in about.items()}, flush=True)
            self.fitted[made_by] = jax.tree.unflatten(jax.tree.structure(self.critic), leaves)
        return self.fitted[made_by]

    def measure(self, params) -> dict[str, float]:
        """First attempts right and errors by kind (slips among planted steps, the others among all), with standard
        errors over problems; log-probabilities of y1."""
        quads = self.evaluator.quads
        prompts = [cts.attempt_prompt(q.x) for q in quads]
        texts = [done["text"] for done in self.evaluator.complete(params, prompts, self.shapes["P_attempt"])]
        right = cts.outcome_scores(texts, quads)[:, 0]
        rows = [step_kinds(text, q.y1, PLANTED[self.args.task]) for text, q in zip(texts, quads)]
        found = {"first": (np.mean(right), np.std(right) / len(right) ** 0.5)}
        for kind in KINDS:
            of = [(sum(k == kind for k, _ in r), sum(p for _, p in r) if kind == "slip" else len(r)) for r in rows]
            hits, steps = np.array(of, float).T
            rate = hits.sum() / max(steps.sum(), 1)
            found[kind] = (rate, np.sqrt(((hits - rate * steps) ** 2).sum()) / max(steps.sum(), 1))
        n = len(quads) // self.args.rows * self.args.rows
        for name, prompt in (("log p(y1|x)", "attempt_prompt"), ("log p(y1|x,y0,f)", "prompt")):
            values = []
            for i in range(0, n, self.args.rows):
                some = quads[i : i + self.args.rows]
                batch = self.pack(some, range(len(some)), b5.Args())
                values += cts.fetch(self.logp(params, batch, prompt)).tolist()
            found[name] = (np.mean(values), np.std(values) / len(values) ** 0.5)
        return found

    def run(self, name: str) -> None:
        """One arm: its rows of the table."""
        term, changes = ARMS[name]
        flags = b5.Args(task=self.args.task, **changes)
        critic = self.fit(flags) if changes.get("target") in ("energy", "shuffled_locus") else self.critic
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.args.learning_rate, b2=0.99))

        @jax.jit
        def add_grads(grads, params, batch):
            def loss(params):
                model, base = nnx.merge(self.graphdef, params), nnx.merge(self.graphdef, self.base)
                fn = {"align": b5.align_term, "decode": b5.decode_term}[term]
                return fn(model, base, nnx.merge(self.critic_def, critic), batch, flags, self.dtype)

            return jax.tree.map(jnp.add, grads, jax.grad(loss, has_aux=True)(params)[0])

        @jax.jit
        def update(params, opt_state, grads):
            updates, opt_state = tx.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

        params = jax.tree.map(jnp.copy, self.base)
        opt_state = tx.init(params)
        for step in range(max(self.args.updates)):
            rows = cts.data_indices(len(self.replay["train"]), self.args.rows, flags.seed, step)
            quads = [self.replay["train"][i] for i in rows]
            batch, grads = self.pack(quads, rows, flags), jax.tree.map(jnp.zeros_like, params)
            for micro in cts.micro_batches(batch, -(-len(rows) // MICRO), self.widths):
                grads = add_grads(grads, params, micro)
            params, opt_state, norm = update(params, opt_state, grads)
            if step + 1 in self.args.updates:
                self.show(name, step + 1, float(norm), self.measure(params))

    def show(self, name: str, updates: int, norm: float, found: dict[str, tuple[float, float]]) -> None:
        share = [f"{100 * m:.1f} ± {100 * e:.1f}" for m, e in (found[k] for k in ("first", *KINDS))]
        logps = [f"{found[k][0]:.1f}" for k in ("log p(y1|x)", "log p(y1|x,y0,f)")]
        print("| " + " | ".join([name, str(updates), *share, *logps, f"{norm:.2f}"]) + " |", flush=True)


def main(args: Args) -> None:
    names = [name.strip() for name in args.arms.split(",")]
    unknown = [name for name in names if name not in ARMS]
    if unknown or args.task not in PLANTED:
        what = f"--arms {unknown[0]}: is none of {', '.join(ARMS)}" if unknown else f"--task {args.task}: has no slips"
        raise cts.InputError(what)
    probe = Probe(args)
    print(f"{args.problems} test problems of {args.task}, greedy, percent ± standard error over problems\n")
    head = ["only this term", "updates", "first attempts right", *KINDS, "log p(y1; x)", "log p(y1; x, y0, f)", "norm"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    probe.show("(base)", 0, 0.0, probe.measure(probe.base))
    for name in names:
        probe.run(name)


if __name__ == "__main__":
    cts.cli(main, Args)
