"""The door and the map: the one import of every script (`import cts_common as cts`), and no code.

Each room below holds one thing, with what may be known of it in its docstring; a room imports only
rooms that stand above it. What the scripts use of a room is imported under its line. Half of the rooms need no JAX.

Axis letters, used as suffixes wherever axes matter: B prompts, G completions per prompt, M = B*G rows, P prompt length,
T completion time, S key time, V vocabulary, D model, N heads, K key/value heads, H head dim, F feed-forward, L layers,
J reasoning steps of a trajectory, R latent dim; in b0 R packed rows of W tokens. Masks are 0/1 float32 and come from
lengths, never from sentinels.
"""
# ruff: noqa: F401, I001

# basics: bad input, JSON lines, atomic writes, digests, PRNG streams, sums of metrics, the trace counter
from common.basics import (
    STREAM_CONTROL, STREAM_INIT, STREAM_ROLLOUT, TRACES, InputError, mean, pack_arrays, reduce, sha256, unpack_arrays,
)  # fmt: skip
# prompts: the three prompts, for math and for code
from common.prompts import attempt_prompt, critique_prompt, revise_prompt
# values: the one value that a text states, read whole by a grammar
# answers: the answer fields of a completion, its final answer, its score
# verifier: math by rules: steps, which of them hold
from common.verifier import uptake
# interpreter: what a program finds in its process, as like a plain machine as can be
# sandbox_server: the process that hostile programs are forked from; it knows no answer
# plans: the tests of a program as data: what it may see, what is done with its values
# sandbox: its client: starts it, feeds it, says how each program ended
from common.sandbox import check_sandbox
# programs: verdicts on programs; what is covered and what is not
from common.programs import run_program, run_programs
# replay: the quadruple, its file format, splits, leakage
from common.replay import Quadruple, replay_sha256
# critique: critiques by rules, redaction, another attempt in y0's place
from common.critique import redact, with_attempts, with_critique, with_critique_of
# cells: a run among others: its name, and what its sweep expects it to be
# sweep: the file of a sweep, read whole, and the command lines that it stands for
# fixtures: generated problems: a small GSM8K, small functions
# slips: planted slips: which operations a base gets wrong, errors by kind of step
# tasks: GSM8K, MBPP, APPS and the table of tasks
from common.tasks import TASKS, check_step_credit
# tokenizer: byte-level tokenizers with byte offsets
# batches: texts as arrays of fixed shape, what of them an update computes, the order of the data
from common.batches import (
    MAX_STEPS, Document, data_indices, decode_rows, fixed_shapes, length_mask, live_rows, micro_batches, pack_answers,
    pack_prompts, pack_revise, pack_rows, pack_trajectories, rollout_prompts, row_shape, update_widths,
)  # fmt: skip
# mistakes: a right solution made wrong
# mutants: a right program made wrong
# hosts: several hosts, the mesh, the one sharding table
from common.hosts import (
    batch_shardings, count_micro_batches, fetch, gather, kept, make_mesh, progress, put, say, shard_rule,
)  # fmt: skip
# making: from problems to replay files, with a report
from common.making import load_replay, make_replay
# model: the decoder: prompts and completions to hidden states
from common.model import (
    Decoder, ModelConfig, Reading, attend, attend_causal, dense, rms_norm, rope_table, rotate,
)  # fmt: skip
# sampling: token log-probs and samples from hidden states
from common.sampling import generate, token_logp
# distances: distances of padded trajectories
from common.distances import l2_distance, pool_steps, sinkhorn_distance, soft_dtw_distance
# rewards: outcome, process, uptake and step rewards
from common.rewards import from_first_error, outcome_scores, process_scores, step_rewards, uptake_scores
# hf_config: config.json of a checkpoint, into the decoder's shape and back
from common.hf_config import read_hf_config
# checkpoints: Hugging Face checkpoints in and out
from common.checkpoints import load_hf_weights
# chat: a checkpoint's tokenizer and the frame of its prompts
# fingerprint: what makes two runs comparable
from common.fingerprint import program_sha256, run_identity, sources_sha256
# base: what a run starts from: the nano base, trained here or shipped, or a checkpoint
from common.base import load_model
# credit: where training moved the policy on a flawed attempt, and what that would be without credit
# evaluation: the measurement that all methods share, and the pre-check of the base
from common.evaluation import Evaluator, base_report, first_problems, summarize
# results: what runs have written: found, checked, refused where it does not belong in one table
# report: result.json, the summary, the curves
# locks: one process at a time in a run's directory
# tracking: W&B, in a process of its own that cannot stop a run
# buckets: a run's folder in a bucket, sent and brought by the run's own order
# stepmetrics: the clock, and what a rollout looks like
from common.stepmetrics import StepClock, rollout_metrics
# run: command line, run directory, checkpoints, signals
from common.run import Run, RunArgs, check_args, cli, open_out_dir, pick_dtype
# sampled: replay whose flawed attempts a model made
from common.sampled import sample_replay
# page: the report as one HTML file
# sheets: what people fill in, and its key
# human: blinded pairs of revisions, what judgements say, audits of a replay
# statistics: a difference over seeds and problems: its interval, its test, what it could have detected
# claims: every measure of every arm, the declared comparisons, the answer in words
# tables: the tables of a report, as Markdown, LaTeX, CSV
# figures: its plots
# The rooms below are those of teacher.py alone: nothing that trains imports them, nor an SDK.
# shelf: replay folders that are there: what one holds, several put together
# ledger: files that only grow and survive any end
# providers: the two wire forms of teachers over an API
# asking: the one loop that sends, waits, sends again and counts the money
# teaching: what a teacher is asked, what becomes of its answer
# records: what the starts of a folder have come to
# batch_jobs: the providers' batch interfaces
# taught: replay that a teacher over an API wrote
