"""Keeps the generated parts of the pages in docs/ true: the diffs between scripts and the line numbers of references.

    python docs/update_methods.py            # rewrites each of PAGES that is out of date

A diff stands between `<!-- diff PARENT CHILD -->` and `<!-- end -->`. A reference is a link whose title is a piece of
the line that it points at: [b2_grpo.py:97](../b2_grpo.py#L97 "def group_advantages"). tests/test_docs.py checks both.
"""

import ast
import difflib
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("methods.md", "metrics.md")]
REFERENCE = re.compile(r'\[([\w/]+\.py):\d+\]\(\.\./\1#L\d+ "([^"]+)"\)')
DIFF = re.compile(r"(<!-- diff (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def body(script: str) -> list[str]:
    """The lines of a script after its docstring."""
    text = (ROOT / script).read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def diff(parent: str, child: str) -> str:
    """Their unified diff, docstrings left out, with one line of context."""
    lines = list(difflib.unified_diff(body(parent), body(child), lineterm="", n=1))[2:]
    return "\n".join("@@" if line.startswith("@@") else line.rstrip() for line in lines)


def line_of(script: str, piece: str) -> int:
    """Number of the one line of a script that holds `piece`; ValueError if there is none, or several."""
    found = [i for i, line in enumerate((ROOT / script).read_text().splitlines(), 1) if piece in line]
    if len(found) != 1:
        raise ValueError(f"{script}: {piece!r} is on lines {found}, and must be on one")
    return found[0]


def updated(text: str) -> str:
    """The page with its generated parts made anew."""

    def reference(m: re.Match) -> str:
        number = line_of(m[1], m[2])
        return f'[{m[1]}:{number}](../{m[1]}#L{number} "{m[2]}")'

    text = DIFF.sub(lambda m: f"{m[1]}```diff\n{diff(m[2], m[3])}\n```\n{m[4]}", text)
    return REFERENCE.sub(reference, text)


if __name__ == "__main__":
    for path in PAGES:
        page = path.read_text()
        new = updated(page)
        path.write_text(new)
        print(f"{path.relative_to(ROOT)}: {'up to date' if new == page else 'rewritten'}")
