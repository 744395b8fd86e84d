"""The words of the prompts, by domain, and their digest.

pytest tests/test_prompts.py
"""

import pytest
from examples import WRONG, X, code_quad

from common import prompts as prompts_room
from common.prompts import attempt_prompt, critique_prompt, revise_prompt, templates_sha256


def test_prompts_are_worded_by_domain():
    q = code_quad()
    prompts = [attempt_prompt(q.x), revise_prompt(q.x, q.y0, q.f), critique_prompt(q.x, q.y0)]
    assert not any("####" in p for p in prompts) and all(p.startswith(f"Problem:\n{X}\n") for p in prompts)
    assert [p.rsplit("\n", 2)[1] for p in prompts] == ["Solution:", "Solution:", "Critique:"]
    assert f"\nAttempt:\n{WRONG}\nCritique:\n{q.f}\n" in prompts[1]
    assert "####" in attempt_prompt("What is 2+3?") and "####" in revise_prompt("What is 2+3?", "5", "No.")


@pytest.mark.parametrize(
    "name", ["CODE_ATTEMPT_TEMPLATE", "CODE_REVISE_TEMPLATE", "CODE_CRITIQUE_TEMPLATE", "CODE_LINE"]
)
def test_the_fingerprint_has_the_code_templates(monkeypatch, name):
    before = templates_sha256()
    monkeypatch.setattr(prompts_room, name, getattr(prompts_room, name) + " ")
    assert templates_sha256() != before
