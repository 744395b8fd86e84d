"""The tasks: GSM8K, MBPP and APPS from local files or the hub, the generated ones, and the table of them all. Used by
making, base and the scripts; gives Problems, never quadruples, and runs no program."""

import ast
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from common.answers import final_answers
from common.basics import InputError, from_hub, parse_line
from common.fixtures import fixtures_code, fixtures_long, fixtures_math, fixtures_rare
from common.plans import flaw_of_tests, joined, parse_program
from common.prompts import CODE_LINE
from common.replay import Problem
from common.slips import PLANTED, Planted
from common.verifier import show


def ask_hub(task: str, files: str, client: str, *args: Any, **kwargs: Any) -> Any:
    """`from_hub` for a task that is also read from `files` in --data_dir."""
    way_out = f"pass --data_dir with {files}"
    return from_hub(client, *args, what=f"{task}: no answer from the hub", way_out=way_out, **kwargs)


def gsm8k(data_dir: str | None) -> list[Problem]:
    """GSM8K from `data_dir`/{train,test}.jsonl, else from the hub (openai/gsm8k, main). https://arxiv.org/abs/2110.14168"""
    problems, hub = [], ("gsm8k", "train.jsonl, test.jsonl", "datasets:load_dataset", "openai/gsm8k", "main")
    for split in ("train", "test"):
        path = data_dir and pathlib.Path(data_dir) / f"{split}.jsonl"
        rows = read_jsonl(path, ("question", "answer")) if path else ask_hub(*hub, split=split)
        for i, row in enumerate(rows):
            x, reference, answer = row["question"].strip(), row["answer"].strip(), final_answers(row["answer"])
            if len(answer) != 1:
                raise InputError(f"gsm8k {split} row {i + 1}: field 'answer' has no single number after ####")
            problems.append(Problem(f"gsm8k/{split}/{i:05d}", x, reference, show(answer[0]), split))
    return problems


def tidy_program(program: str) -> str:
    """A reference program with plain line ends, no white space at line ends and spaces for leading tabs, as far as it
    stays the same program. "def f():\\r\\n\\treturn 1 \\r\\n" gives "def f():\\n    return 1".
    """
    lines = program.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    plain = parse_program("\n".join(lines))
    for width in (4, 8):  # 8 is Python's own reading of a tab that stands among spaces
        indents = [line[: len(line) - len(line.lstrip())].expandtabs(width) for line in lines]
        text = "\n".join(f"{a}{b.strip()}".rstrip() for a, b in zip(indents, lines)).strip("\n")
        tree = parse_program(text)
        if plain and tree and ast.dump(tree) == ast.dump(plain):
            return text
    return "\n".join(lines)


def mbpp(data_dir: str | None) -> list[Problem]:
    """MBPP from `data_dir`/mbpp.jsonl, else from the hub (google-research-datasets/mbpp). https://arxiv.org/abs/2108.07732

    Its task ids 11 to 510 are test; the rest (few-shot prompts, validation, training) is train. x shows the
    shortest assert of three: it fixes name and form, and a program that only knows the shown one fails.
    """
    if data_dir:
        path = pathlib.Path(data_dir) / "mbpp.jsonl"
        rows = [(f"{path}:{i}", row) for i, row in enumerate(read_jsonl(path, ("text", "code")), 1)]
    else:
        parts = ask_hub("mbpp", "mbpp.jsonl", "datasets:load_dataset", "google-research-datasets/mbpp", "full")
        rows = [(f"mbpp {name} row {i}", row) for name, part in parts.items() for i, row in enumerate(part, 1)]
    problems = []
    for where, row in sorted(rows, key=lambda r: r[1]["task_id"] if isinstance(r[1].get("task_id"), int) else -1):
        number, asserts, setup = row.get("task_id"), row.get("test_list"), row.get("test_setup_code") or ""
        if not isinstance(number, int):
            raise InputError(f"{where}: field 'task_id' must be an integer")
        tests = {"setup": setup, "asserts": asserts}
        if asserts and flaw_of_tests(tests):
            raise InputError(f"{where}: fields 'test_list', 'test_setup_code': {flaw_of_tests(tests)}")
        shown = f"\nIt has to pass, among others:\n{min(asserts, key=len)}" if asserts else ""
        x, split = f"{row['text'].strip()}{shown}{CODE_LINE}", "test" if 11 <= number <= 510 else "train"
        reference = tidy_program(row["code"])
        problems.append(Problem(f"mbpp/{number:05d}", x, reference, "", split, tests if asserts else None))
    return problems


MOST_TESTS, MOST_TEST_CHARS = 32, 65_536  # kept of one APPS problem: some have hundreds, some of a megabyte


def apps(data_dir: str | None) -> list[Problem]:
    """APPS from `data_dir`/{train,test}.jsonl (one of them is enough), else those files from the hub (codeparrot/apps;
    it is a script data set, which `datasets` no longer runs). https://arxiv.org/abs/2105.09938

    Both kinds of tests: programs on standard input, and calls of `fn_name`. The reference is the first of the solutions
    that is Python 3. A problem without tests or solutions is returned as such; the teacher drops and counts it.
    """
    problems, hub = [], ("apps", "train.jsonl, test.jsonl", "huggingface_hub:hf_hub_download", "codeparrot/apps")
    for split, beside in (("train", "test"), ("test", "train")):
        if data_dir:
            path, other = (pathlib.Path(data_dir) / f"{name}.jsonl" for name in (split, beside))
            if not path.is_file() and other.is_file():
                continue
        else:
            path = pathlib.Path(ask_hub(*hub, f"{split}.jsonl", repo_type="dataset"))
        for i, row in enumerate(read_jsonl(path, ("question", "difficulty")), 1):
            number = row.get("problem_id", row.get("id", i - 1))
            tests, left_out = apps_tests(row, f"{path}:{i}")
            solutions = json_field(row, "solutions", list, f"{path}:{i}") or []
            tidy = (tidy_program(p) for p in solutions if isinstance(p, str) and p.strip())
            reference = next((p for p in tidy if parse_program(p)), "")
            starter = str(row.get("starter_code") or "").strip("\n")
            if tests and "fn_name" in tests:
                how = f"Complete this program:\n{starter}" if starter else f"Write the function {tests['fn_name']}."
            else:
                how = "Read from standard input and write to standard output."
            x = f"{row['question'].strip()}\n{how}{CODE_LINE}"
            notes = {"difficulty": row["difficulty"], "tests_left_out": left_out}
            problems.append(Problem(f"apps/{split}/{number}", x, reference, "", split, tests, notes))
    return problems


def json_field(row: dict, field: str, kind: type, where: str) -> Any:
    """The JSON text in a field of a source row, read; None where it is empty or holds an integer too long to read."""
    text = row.get(field) or ""
    try:
        value = json.loads(text) if isinstance(text, str) and text.strip() else text or None
    except (json.JSONDecodeError, RecursionError) as e:
        raise InputError(f"{where}: field {field!r} is not JSON ({e})") from None
    except ValueError:  # more digits than Python reads by default
        return None
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{where}: field {field!r} must hold a JSON {'object' if kind is dict else 'list'}")
    return value


def apps_tests(row: dict, where: str) -> tuple[dict[str, Any] | None, int]:
    """(tests, how many were left out) of an APPS row: the first ones that fit the bounds; None where there are none, or
    where inputs and outputs do not go together."""
    source = json_field(row, "input_output", dict, where) or {}
    inputs, outputs = source.get("inputs") or [], source.get("outputs") or []
    call = {"fn_name": source["fn_name"]} if source.get("fn_name") else {}
    if not call:  # some rows hold a text as the list of its lines
        inputs, outputs = ([joined(text) for text in part] for part in (inputs, outputs))
    if flaw_of_tests({**call, "inputs": inputs, "outputs": outputs}):
        return None, 0
    kept, room = [], MOST_TEST_CHARS
    for pair in zip(inputs, outputs):
        size = len(json.dumps(pair))
        if size <= room and len(kept) < MOST_TESTS:
            kept.append(pair)
            room -= size
    tests = {**call, "inputs": [a for a, _ in kept], "outputs": [b for _, b in kept]}
    return tests if kept else None, len(inputs) - len(kept)


def read_jsonl(path: pathlib.Path, fields: tuple[str, ...]) -> Iterator[dict]:
    """Rows of a JSONL source file, one at a time (APPS has 1.3 GB), each checked to hold `fields` as strings."""
    i = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:  # lines end at \n alone: U+2028 is text
            for i, line in enumerate(file, 1):
                row = parse_line(line, f"{path}:{i}")
                for field in fields:
                    if not isinstance(row, dict) or not isinstance(row.get(field), str):
                        raise InputError(f"{path}:{i}: field {field!r} must be a string")
                yield row
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}; check --data_dir") from None
    if i == 0:
        raise InputError(f"{path} is empty; check --data_dir")


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is loaded and how large the nano-LM's part of it is (tokens, vocabulary, base-training tokens)."""

    domain: str
    load: Any  # data_dir | None -> list[Problem]
    max_new_tokens: int
    nano_vocab: int
    base_steps: int
    base_rows: int  # of a step
    base_width: int  # tokens a row
    planted: Planted | None = None  # the slips that its nano base is taught
    base_lr: float = 1e-2


TASKS = {
    "fixtures_math": Task("math", lambda data_dir: fixtures_math(), 128, 512, 480, 8, 288),
    "fixtures_long": Task("math", lambda data_dir: fixtures_long(), 256, 512, 2000, 8, 576, PLANTED["fixtures_long"]),
    "fixtures_rare": Task("math", lambda data_dir: fixtures_rare(), 256, 512, 2000, 8, 576, PLANTED["fixtures_rare"]),
    "gsm8k": Task("math", gsm8k, 256, 2048, 200, 2, 512, base_lr=2e-2),
    "fixtures_code": Task("code", lambda data_dir: fixtures_code(), 80, 512, 480, 8, 288),
    "mbpp": Task("code", mbpp, 256, 2048, 200, 2, 512, base_lr=2e-2),
    "apps": Task("code", apps, 512, 4096, 300, 1, 2048),
}


def get_task(name: str) -> Task:
    """The task called `name`; InputError lists the known ones."""
    if name not in TASKS:
        raise InputError(f"--task {name}: unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def check_step_credit(task: str, credit: str) -> None:
    """Credit of single steps needs steps that can be checked one by one; InputError for a code task."""
    if credit != "rolled_up" and get_task(task).domain != "math":
        raise InputError(f"--process_credit {credit}: works on math tasks, {task} is code; use rolled_up")
