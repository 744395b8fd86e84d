"""Run plumbing: command line, run directory and its lock, metrics.jsonl, Orbax checkpoints, signals. Used by all
scripts."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils

from common.base import model_source
from common.basics import TRACES, DiskError, InputError, writable, write_atomic
from common.buckets import begin, is_url, look, mirrored
from common.cells import EXPECTED, check_expected, run_name, run_settings
from common.checkpoints import MADE_BY, check_save_hf, save_hf
from common.evaluation import summarize
from common.fingerprint import count_budgets
from common.hosts import broadcast, leads, on_leader, progress, say, start_hosts
from common.locks import lock, unlock
from common.prompts import revise_prompt
from common.replay import Quadruple
from common.report import make_result, plot_curves, print_summary
from common.tracking import STOP_WAIT, Tracker, wandb_mode


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """The flags of pure plumbing, the same in every script, whose `Args` extend them: where data comes from and results
    go, on what devices. What a method's result depends on stands in the script."""

    # ---- plumbing ----
    data_dir: str | None = None
    """folder with the task's source files (gsm8k, apps: train.jsonl, test.jsonl; mbpp: mbpp.jsonl); none = the hub"""
    replay: str | None = None
    """folder with {train,val,test}.jsonl quadruples; none = data/replay/<task>, made if it is not there"""
    out_dir: str = "runs"
    """folder, or gs:// or s3:// bucket, for the run's directory, the cached bases and compiled programs"""
    resume: bool = False
    """continue this very command's run from its last checkpoint"""
    save_hf: str | None = None
    """folder to write the trained policy to, as transformers loads it; none = off"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode; auto = online where you are logged in, else offline"""
    unsafe_sandbox: Literal["refuse", "allow"] = "refuse"
    """allow = run the programs of code tasks even where this machine can confine nothing; they are hostile"""
    hosts: str = "auto"
    """hosts of this run: auto = what TPUs, srun, Kubernetes or Open MPI 4 tell; else ADDRESS:PORT,COUNT,INDEX"""
    mesh: str = "auto"
    """device mesh DATA,MODEL, e.g. 4,2; auto = all devices on data"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute dtype; auto = bfloat16 on accelerators, float32 on CPU; weights and reductions are float32 always"""
    eval_every: int = 0
    """steps between evaluations on the validation split; 0 = only the final one, on test"""
    save_every: int = 25
    """steps between checkpoints; 0 = only the last"""


NANO_RATE = 1e-4  # a peak learning rate above it has to do with small models
AT_MOST = {"seed": 2**32 - 1}  # more would be cut to 32 bits by jax.random.key
ABOVE_ZERO = ("steps", "prompts", "group", "max_prompt_tokens", "temperature", "learning_rate")


def cli(main, args_type):
    """Parse the command line, join the hosts of `--hosts`, run `main`; bad input prints one line and exits with 2, a
    full disk with 1."""
    args = tyro.cli(args_type)
    try:
        if hasattr(args, "hosts"):
            start_hosts(args.hosts)
        with mirrored(args, jax.process_count) as args:
            return main(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, DiskError) else 2)


def open_out_dir(args: RunArgs) -> None:
    """Make sure `--out_dir` can be written and that nothing is at `--save_hf` yet (with --resume it may be the run's
    own; `Run` knows). Compiled programs are kept in `--out_dir`, so that the next run starts at once."""

    def check():
        if args.save_hf and not args.resume:
            check_save_hf(pathlib.Path(args.save_hf))
        if is_url(args.out_dir):
            raise InputError(f"--out_dir {args.out_dir}: is for the command line; `main` takes a folder")
        writable(args.out_dir, "out_dir")

    on_leader(check)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(args.out_dir).absolute() / "xla_cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_args(args, *above_zero: str, **at_most: float) -> None:
    """InputError unless every number is finite and not below 0; those of ABOVE_ZERO and `above_zero` are above it, and
    those of `at_most` no larger than it says."""
    at_most = AT_MOST | at_most
    for flag, value in dataclasses.asdict(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        positive = flag in (*ABOVE_ZERO, *above_zero)
        if not (value > 0 if positive else value >= 0) or math.isinf(value):
            least = "at least 0" if not positive else "at least 1" if isinstance(value, int) else "above 0"
            raise InputError(f"--{flag} {value}: must be {least}")
        if value > at_most.get(flag, math.inf):
            raise InputError(f"--{flag} {value}: must be at most {at_most[flag]}")
    if hasattr(args, "adv_norm") and args.group == 1:
        raise InputError("--group 1: a completion is compared with the others of its group; give 2 or more")
    if isinstance(args, RunArgs) and args.model != "nano" and args.learning_rate > NANO_RATE:
        say(f"--learning_rate {args.learning_rate:g} suits the nano model; checkpoints usually take 1e-6 to 1e-5 here.")


def pick_dtype(name: str):
    """Compute dtype of `--dtype`: auto is bfloat16 on accelerators and float32 on CPU."""
    usual = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(name, usual)


class Run:
    """One run's directory and all that is written to it: metrics.jsonl, samples.jsonl, checkpoints/, result.json,
    curves.png, and what W&B writes. One process at a time holds its lock."""

    def __init__(self, args, script: str):
        """`script`: the file of the method, which names it."""
        import orbax.checkpoint as ocp

        self.method = pathlib.Path(script).stem
        self.name = run_name(args, self.method)
        self.dir = pathlib.Path(args.out_dir).absolute() / self.name
        self.args, self.stopped_by, self.stepping, self.tracker = args, None, False, None
        on_leader(self._open, run_settings(args))
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.checkpoints = ocp.CheckpointManager(self.dir / "checkpoints", options=options)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _open(self, settings: dict[str, Any]) -> None:
        """Make and lock the directory; InputError if another process holds it, if a run is there already and --resume
        is not, or if --resume would begin a run beside an unfinished one."""
        begin(self.dir)
        launched = os.environ.get(EXPECTED) or "CTS_LAUNCHER" in os.environ  # others stand beside it, or it starts here
        if self.args.resume and not self.dir.exists() and not launched:
            self._refuse_other_flags(settings)
            say(f"--resume: there is no run with these flags in {self.dir.parent}; this one begins at step 0.")
        if self.args.save_hf and not self._exported():
            check_save_hf(pathlib.Path(self.args.save_hf))
        self.dir.mkdir(parents=True, exist_ok=True)
        lock(self.dir / "lock")
        if (self.dir / "args.json").is_file() and not self.args.resume:
            unlock(self.dir / "lock")
            what = "has finished" if self.finished else "has not finished"
            raise InputError(f"{self.dir} is there already and {what}: add --resume, or choose another --out_dir")
        (self.dir / "checkpoints").mkdir(exist_ok=True)
        write_atomic(self.dir / "args.json", json.dumps(settings, indent=1))

    def _refuse_other_flags(self, settings: dict[str, Any]) -> None:
        """InputError if there is an unfinished run of the same method, task and seed with other flags: it is what
        --resume was meant for, and this run would not continue it."""
        for other in sorted(self.dir.parent.glob(f"{self.name.rpartition('__')[0]}__*")):
            if (other / "args.json").is_file() and not (other / "result.json").is_file():
                then = json.loads((other / "args.json").read_text())
                names = [k for k in {**then, **settings} if then.get(k) != settings.get(k)]
                changed = [f"--{k} {then.get(k)} (now {settings.get(k)})" for k in names]
                raise InputError(
                    f"--resume: {other} was started with {', '.join(changed)}; give the same flags, or drop --resume to"
                    " start another run"
                )

    def _on_signal(self, number, _frame) -> None:
        self.stopped_by = number  # a flag only: the loop saves at the end of its step
        if not self.stepping:  # before the first step there is nothing to save, after the last all is saved
            os.write(2, f"stopped by signal {number} outside of the steps; continue with --resume\n".encode())
            if self.tracker:
                self.tracker.close(128 + number, STOP_WAIT)
            sys.exit(128 + number)

    @property
    def finished(self) -> bool:
        """Whether it is trained and measured; `result` then makes what else it was asked for."""
        return (self.dir / "result.json").is_file()

    def result(self, cfg, like, tokenizer) -> dict[str, Any]:
        """What a finished run wrote. Before it, the checkpoint of `--save_hf`, if that is missing, of the last
        checkpoint here; `like`: parameters whose shapes and layout the policy's are."""
        result = json.loads((self.dir / "result.json").read_text())
        self._export(cfg, lambda: self._restore_policy(like, tokenizer), tokenizer)
        say(f"{self.name} has finished already: {self.dir / 'result.json'}")
        unlock(self.dir / "lock")
        return result

    def _exported(self) -> bool:
        """Whether what is at `--save_hf` is this run's export: it says so, and the run has said so before."""
        record, target = self.dir / "exports", pathlib.Path(self.args.save_hf).absolute()
        ours = record.is_file() and str(target) in record.read_text().splitlines()
        return ours and (target / MADE_BY).is_file() and (target / MADE_BY).read_text() == self.name

    def _export(self, cfg, policy, tokenizer) -> None:
        """Make the checkpoint of `--save_hf`, if it was asked for and is not there, of what `policy()` returns."""

        def announce():  # it appears whole, and by then has to be known as this run's
            check_save_hf(target)
            with open(self.dir / "exports", "a", encoding="utf-8") as f:
                f.write(f"{target.absolute()}\n")

        if self.args.save_hf and not broadcast("there" if leads() and self._exported() else ""):
            target = pathlib.Path(self.args.save_hf)
            on_leader(announce)
            save_hf(target, cfg, policy(), tokenizer, model_source(self.args.model), made_by=self.name)

    def start(self, identity: dict[str, Any], params, opt_state):
        """(params, opt_state): goes on from the newest checkpoint, if there is one, and opens W&B. `identity` is
        `run_identity`: a checkpoint made under another one is refused, and a run that its sweep has not planned."""
        self.identity = identity
        on_leader(check_expected, identity)
        TRACES.clear()  # what was traced for the base is not the run's
        (params, opt_state), self.first_step = self._restore((params, opt_state))
        mode, config = wandb_mode(self.args.wandb), {**dataclasses.asdict(self.args), "identity": identity}
        about = dict(name=self.name, job_type=self.method, config=config)
        self.tracker = Tracker(self.dir, mode if leads() else "disabled", **about)
        return params, opt_state

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One line of metrics.jsonl for one step."""
        self._append("metrics.jsonl", [{"step": step, **metrics}])
        self.tracker.look()
        look()

    def log_samples(self, quads: list[Quadruple], texts: list[str], rewards, step: int) -> None:
        """The first completion of every prompt and its reward, into samples.jsonl."""
        rows = [
            dict(step=step, prompt=revise_prompt(q.x, q.y0, q.f)[:2000], completion=text[:2000], reward=float(r))
            for q, text, r in zip(quads, texts, rewards)
        ]
        self._append("samples.jsonl", rows)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Lines at the end of one of the two files that W&B's process follows."""
        if leads():
            try:
                with open(self.dir / name, "a", encoding="utf-8") as f:
                    f.write("".join(json.dumps(row) + "\n" for row in rows))
            except OSError as e:
                raise DiskError.at(self.dir / name, e) from None

    def save(self, step: int, state) -> None:
        """Checkpoint after `step` finished steps: parameters, optimizer and the run's identity. Data order and PRNG are
        functions of (seed, step)."""
        if step not in self.checkpoints.all_steps():
            args = self._ocp.args
            parts = args.Composite(state=args.StandardSave(state), identity=args.JsonSave(self.identity))
            self.checkpoints.save(step, args=parts)

    def _restore(self, state):
        """(state, finished steps) of the newest readable checkpoint, or (state, 0); later metrics lines are dropped.

        A damaged checkpoint (cut off, half deleted) is named, the one before it used, and only then the damaged one
        removed. InputError if none can be read, or if the checkpoint was made under another identity: it names the
        fields that changed.
        """
        as_args, done, damaged = self._ocp.args, 0, []
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, state)
        named, whole = as_args.Composite(identity=as_args.JsonRestore()), as_args.StandardRestore(abstract)
        for step in sorted(self.checkpoints.all_steps(), reverse=True):
            try:
                then = self.checkpoints.restore(step, args=named)["identity"]
                changed = [k for k, v in self.identity.items() if k != "digest" and then.get(k) != v]
                if not changed:  # else the shapes may be others, too
                    state = self.checkpoints.restore(step, args=as_args.Composite(state=whole))["state"]
            except Exception as e:  # a cut-off data file makes Orbax raise plain Exception
                reason = " ".join(str(e).split())[:80]
                say(f"checkpoint {step} in {self.dir} is damaged ({type(e).__name__}: {reason}); trying the one before")
                damaged.append(step)
                continue
            if changed:
                what = ", ".join(changed)
                raise InputError(f"--resume: {self.dir} was started with another {what}; choose another --out_dir")
            done = step
            break
        if damaged and not done:
            folder = self.dir / "checkpoints"
            raise InputError(f"--resume: no checkpoint in {folder} can be read; remove that folder to start over")
        for step in damaged:  # out of the way of the one that will be saved there again
            self.checkpoints.delete(step)
        on_leader(self._truncate, done)
        return state, done

    def _truncate(self, step: int) -> None:
        """Both logs without what comes after `step` finished steps, and without lines that were cut off."""

        def kept(line: str) -> bool:
            try:
                return json.loads(line)["step"] < step
            except ValueError:
                return False

        for path in (self.dir / "metrics.jsonl", self.dir / "samples.jsonl"):
            if path.is_file():
                lines = path.read_text(errors="replace").split("\n")
                write_atomic(path, "".join(line + "\n" for line in lines if kept(line)))

    def _restore_policy(self, like, tokenizer):
        """The trained policy of a finished run, and nothing else of its last checkpoint; InputError if that cannot be
        read, or is of another tokenizer."""
        ocp, step = self._ocp, self.args.steps
        try:
            shape = ocp.PyTreeCheckpointer().metadata(self.dir / "checkpoints" / str(step) / "state")
            item = jax.tree.map(lambda _: ocp.PLACEHOLDER, shape.item_metadata.tree)
            item[0]["policy"] = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            state = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
            parts = ocp.args.Composite(state=state, identity=ocp.args.JsonRestore())
            saved = self.checkpoints.restore(step, args=parts)
        except Exception as e:
            what = f"--save_hf: checkpoint {step} in {self.dir} cannot be read ({type(e).__name__})"
            raise InputError(f"{what}; remove result.json there, and --resume goes on from the one before") from None
        if saved["identity"]["tokenizer"] != tokenizer.sha256():
            raise InputError(f"--save_hf: {self.dir} was trained with another tokenizer; restore replay and --model")
        return saved["state"][0]["policy"]

    def stop_if_asked(self, step: int, state) -> None:
        """After SIGTERM or SIGUSR1: save, mark the W&B run preempting, exit with 128 + signal (schedulers requeue). The
        signal may have reached one host only."""
        number = self.stopped_by or 0
        if jax.process_count() > 1:
            number = int(multihost_utils.process_allgather(np.int32(number)).max())
        if number:
            self.save(step, state)
            self.tracker.close(128 + number, STOP_WAIT)
            unlock(self.dir / "lock")
            say(f"stopped by signal {number} after step {step}; continue with --resume")
            sys.exit(128 + number)

    def check_finite(self, metrics: dict[str, float], step: int, ids: list[str]) -> None:
        """Stop on a NaN or infinite loss or gradient, of any term, naming the step, the batch and the last good
        checkpoint."""
        told = [k for k, v in metrics.items() if k.endswith(("loss", "grad_norm")) and not math.isfinite(v)]
        if told:
            self.tracker.close(1)
            good = max(self.checkpoints.all_steps(), default=None)
            raise FloatingPointError(
                f"loss or gradient is not finite at step {step} ({', '.join(told)}; batch {', '.join(ids)});"
                f" last good checkpoint: {good} in {self.dir}"
            )

    def steps(self):
        """The numbers of the steps that are left, behind a progress bar."""
        first, total = self.first_step, self.args.steps
        self.stepping = first < total
        self.bar = progress(range(first, total), initial=first, total=total, desc=self.method)
        return self.bar

    def end_step(self, step: int, metrics, params, opt_state, quads, validation, texts=(), rewards=()) -> None:
        """What ends every step: a stop if anything is not finite, the validation split when it is due, one line of log,
        samples every quarter of a run (`texts`, `rewards`: one a prompt), a checkpoint, a stop that was asked for."""
        args, done, state = self.args, step + 1, (params, opt_state)
        self.check_finite(metrics, step, [q.meta["task_id"] for q in quads])
        if args.eval_every and done % args.eval_every == 0:
            summary = summarize(validation(params["policy"]))
            metrics |= {f"eval/{k}": summary[k] for k in ("accuracy", "accuracy_revised", "delta_critique")}
        self.log(metrics, step)
        shown = [k for k in ("charts/reward", "charts/accuracy") if k in metrics] or ["losses/loss"]
        self.bar.set_postfix({k.partition("/")[2]: f"{metrics[k]:.3f}" for k in shown})
        if texts and step % max(1, args.steps // 4) == 0:
            self.log_samples(quads, texts, rewards, step)
        if done == args.steps or (args.save_every and done % args.save_every == 0):
            self.save(done, state)
        self.stop_if_asked(done, state)
        self.stepping = done < args.steps

    def finish(self, replay, shapes, base, records, final, clock, trained) -> dict[str, Any]:
        """The result of a run: curves.png and result.json (written last, atomically), the summary in print, the
        checkpoint of `--save_hf`, made of `trained`: (config, policy, tokenizer); at the end, a while for W&B."""
        steps, B, G = self.first_step + clock.steps, self.args.prompts, self.args.group
        budgets, timings = count_budgets(steps, B, G, shapes, len(records)), clock.summary()
        result = make_result(self.args, self.method, self.identity, budgets, replay, base, records, final, timings)
        if leads():
            plot_curves(self.dir, base["summary"], final)
            write_atomic(self.dir / "result.json", json.dumps(result, indent=1))
            print_summary(self.name, self.dir, result, base["summary"], final)
        cfg, policy, tokenizer = trained
        self._export(cfg, lambda: policy, tokenizer)
        self.tracker.close(0)
        unlock(self.dir / "lock")
        return result
