"""What a run starts from: the documents of the nano base, their packing, and a fetched checkpoint.

pytest tests/test_base.py
"""

import dataclasses

import huggingface_hub
import numpy as np
import pytest
from examples import GOLDEN, REFERENCE, ROW, WRONG, X, code_quad, math_quad, refused
from huggingface_hub.errors import HFValidationError

from common.base import BASE_PROSE, base_documents, fetch_model, pack_documents
from common.prompts import attempt_prompt, revise_prompt
from common.tokenizer import train_tokenizer


# ---- the nano base --------------------------------------------------------------------------------------------------
def test_pack_documents_worked_example():
    """The docstring's numbers, and a document that is cut."""
    tokens, segments, weights = pack_documents([([1, 2], [3]), ([4], [5])], 6, 0, 0.0)
    assert (tokens.tolist(), segments.tolist(), weights.tolist()) == (
        [[1, 2, 3, 4, 5, 0]],
        [[1, 1, 1, 2, 2, 0]],
        [[0, 0, 1, 0, 1, 0]],
    )
    tokens, segments, weights = pack_documents([([1, 2, 3], [4, 5])], 4, 0, 0.5)
    assert (tokens.tolist(), segments.tolist(), weights.tolist()) == (
        [[1, 2, 3, 4]],
        [[1, 1, 1, 1]],
        [[0.5, 0.5, 0.5, 1]],
    )


def test_pack_documents_keeps_every_token_once():
    """Random documents: each is one contiguous segment somewhere, with its weights; the rest is padding."""
    rng, next_id, documents = np.random.default_rng(3), 1, []
    for _ in range(200):
        n, m = (int(v) for v in rng.integers(1, 15, 2))
        documents.append((list(range(next_id, next_id + n)), list(range(next_id + n, next_id + n + m))))
        next_id += n + m
    tokens, segments, weights = pack_documents(documents, 40, 0, 0.25)
    assert tokens.shape == segments.shape == weights.shape == (len(tokens), 40)
    found = []
    for row, segment, weight in zip(tokens, segments, weights):
        assert (np.diff(np.append(segment[segment > 0], 10**6)) >= 0).all()
        for s in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == s)
            assert (np.diff(at) == 1).all()
            found.append((row[at].tolist(), weight[at].tolist()))
        assert (row[segment == 0] == 0).all()
        assert (weight[segment == 0] == 0).all()
    wanted = [(p + c, [0.25] * len(p) + [1.0] * len(c)) for p, c in documents]
    assert sorted(found) == sorted(wanted)
    assert len(tokens) < 1.25 * next_id / 40  # and rows are well filled


def test_base_documents(tokenizer):
    """Each problem once per prompt format; one revision in two without critique, the other half next epoch, and then
    only the attempt's answer again; BASE_PROSE of the answers are stated in prose."""
    quads = [math_quad(x=f"Problem {i}?" + " so" * (10 * (i % 7)), f=f"critique {i}") for i in range(40)]
    left_out, prose = [], []
    for epoch in range(2):
        documents = base_documents(tokenizer, quads, epoch)
        prompts = tokenizer.decode([p for p, _ in documents])
        answers = dict(zip(prompts, tokenizer.decode([a for _, a in documents])))
        assert all(a[-1] == tokenizer.eos_id for _, a in documents)
        prose.append(np.mean(["The answer is" in a for a in answers.values()]))
        solution = ROW["y1"].split("####")[0]
        for q in quads:
            assert answers[attempt_prompt(q.x)].startswith(solution)
            with_f, without = (answers.get(revise_prompt(q.x, q.y0, f)) for f in (q.f, ""))
            assert with_f.startswith(solution) if with_f else without in ("#### 6", "The answer is 6.")
        without_f = [i for i, q in enumerate(quads) if revise_prompt(q.x, q.y0, "") in prompts]
        wanted = [attempt_prompt(q.x) for q in quads]
        wanted += [revise_prompt(q.x, q.y0, "" if i in without_f else q.f) for i, q in enumerate(quads)]
        assert sorted(prompts) == sorted(wanted)
        assert len(without_f) == 20
        left_out += without_f
        lengths = [len(p) for p, _ in documents]
        by_length = np.corrcoef(np.arange(80), lengths)[0, 1]
        assert by_length > 0.5 if epoch == 0 else abs(by_length) < 0.4  # short first, then shuffled
        assert documents == base_documents(tokenizer, quads, epoch)
    assert sorted(left_out) == list(range(40))
    assert abs(np.mean(prose) - BASE_PROSE[1]) < 0.1  # all of these open with a P


def test_base_documents_of_programs():
    """Some print what they should return; a revision without a critique keeps the attempt."""
    q = code_quad()
    quads = [dataclasses.replace(q, x=f"{name}{i} {X}") for name in ("calc", "work") for i in range(60)]
    tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1], 400)
    documents = base_documents(tokenizer, quads, 0)
    pairs = [tuple(tokenizer.decode([p, a])) for p, a in documents]
    assert len(pairs) == 240
    for prompt, answer in pairs:
        without = "Critique:\n\n" in prompt
        program = answer.replace("print(r)", "return r")
        assert program == (WRONG if without else REFERENCE)
    printed = {n: np.mean(["print(r)" in a for p, a in pairs if f"\n{n}" in p]) for n in ("calc", "work")}
    assert 0.55 < printed["calc"] < 0.95 and printed["work"] < 0.3


# ---- fetching -------------------------------------------------------------------------------------------------------
def test_fetch_uses_a_directory_as_it_is(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("not to be called"))
    assert fetch_model(str(GOLDEN / "qwen2")) == GOLDEN / "qwen2"


def test_fetch_downloads_configs_and_safetensors_only(monkeypatch, tmp_path):
    calls = []
    fake = lambda name, allow_patterns: calls.append((name, allow_patterns)) or str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert fetch_model("org/model") == tmp_path
    assert calls == [("org/model", ["*.json", "*.safetensors", "*.jinja"])]


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError(""), HFValidationError("x")])
def test_fetch_failure_is_one_line(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(lambda: fetch_model("org/none"), "--model org/none", "HF_TOKEN")
