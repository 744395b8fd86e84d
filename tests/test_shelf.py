"""What a person does with replay that is there: look into it, put it together, have it judged.

pytest tests/test_shelf.py
"""

import dataclasses

import pytest
from examples import code_quad, math_quad

import teacher
from common.basics import InputError
from common.replay import read_replay, write_replay
from common.shelf import merge, read_folder, stats


def quad(x: str, split: str = "train", **meta):
    return dataclasses.replace(math_quad(meta={"task_id": x, "split": split, **meta}), x=x)


@pytest.fixture
def folders(tmp_path):
    write_replay(tmp_path / "a" / "train.jsonl", [quad("How many?"), quad("And now?", is_human_audited=True)])
    write_replay(tmp_path / "a" / "val.jsonl", [])
    write_replay(tmp_path / "a" / "test.jsonl", [quad("At last?", "test", error_span=None)])
    write_replay(tmp_path / "b" / "train.jsonl", [quad(" how MANY? ", teacher="rules"), quad("More?", teacher="rules")])
    return tmp_path


def test_stats(folders, capsys):
    found = stats(str(folders / "a"))
    assert found["splits"] == {"train": 2, "test": 1} and found["quadruples"] == found["problems"] == 3
    assert found["with_span"] == pytest.approx(2 / 3) and found["audited"] == 1 and found["teachers"] == {"own": 3}
    out = capsys.readouterr().out
    assert "splits                train 2, test 1" in out and "with_span             0.667" in out
    assert teacher.main(teacher.Args(stats=str(folders / "a"))) == found


def test_merge(folders, capsys):
    """A problem that stands in both is the first one's; the order is kept, an empty split is an empty file."""
    args = teacher.Args(merge=(str(folders / "a"), str(folders / "b")), out=str(folders / "ab"))
    assert teacher.main(args) == {"splits": {"train": 3, "test": 1}, "left_out": 1}
    merged = read_folder(str(folders / "ab"))
    assert [q.x for q in merged["train"]] == ["How many?", "And now?", "More?"]
    assert [q.meta["teacher"] for q in merged["train"]] == ["own", "own", "rules"]
    assert (folders / "ab" / "val.jsonl").read_text() == "" and "1 left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds files already"):
        teacher.main(args)


@pytest.mark.parametrize(
    ("quads", "message"),
    [([quad("At last?", "train")], "leakage"), ([code_quad(split="train")], "merge replays of one kind")],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(folders, quads, message):
    write_replay(folders / "c" / "train.jsonl", quads)
    with pytest.raises(InputError, match=message):
        merge((str(folders / "a"), str(folders / "c")), str(folders / "out"))
    assert not (folders / "out").exists()
    with pytest.raises(InputError, match="holds no replay"):
        merge((str(folders / "a"), str(folders / "none")), str(folders / "out"))
    with pytest.raises(InputError, match="--merge: say with --out"):
        teacher.main(teacher.Args(merge=(str(folders / "a"),)))


def test_a_sheet_goes_out_and_comes_back(folders, capsys):
    """A person answers all of two rows and skips the third; the two are marked, in the replay itself."""
    pytest.importorskip("common.human", reason="the room that writes sheets is not there")
    out = str(folders / "a")
    teacher.main(teacher.Args(audit=3, out=out))
    sheet = folders / "a" / "audit" / "audit.csv"
    fill(sheet, [("yes", "yes", "no"), ("no", "yes", "no"), ("skip", "skip", "skip")])
    before = [q.meta["is_human_audited"] for q in all_of(folders / "a")]
    found = teacher.main(teacher.Args(audited=str(sheet), out=out))
    assert before.count(True) == 1 and found["audited"] == 2
    assert sum("audit" in q.meta for q in all_of(folders / "a")) == 2
    assert all(q.meta["is_human_audited"] for q in all_of(folders / "a") if "audit" in q.meta)
    assert "2 of 3 rows" in capsys.readouterr().out


def all_of(folder):
    return [q for split in ("train", "test") for q in read_replay(folder / f"{split}.jsonl")]


def fill(sheet, answers):
    """Fill in the columns of a sheet as a spreadsheet would."""
    import csv

    with open(sheet, encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    at = [i for name in ("right", "first", "leaks") for i, text in enumerate(head) if text.split()[0] == name]
    for row, answer in zip(rows, answers):
        for place, word in zip(at, answer):
            row[place] = word
    with open(sheet, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([head, *rows])
