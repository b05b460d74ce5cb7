"""Leaderboards: shares of the teacher, means over seeds, and rows that stay from one report to the next."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fewstep.errors import UserError
from fewstep.evaluation.board import Board, Protocol, Row, grouped, read_board, require_same, write_board
from fewstep.evaluation.table import head, lines, markdown

PROTOCOL = Protocol("emoji32", "classifier", 100, 0)
TEACHER = Row("teacher t", "", "teacher", 4, 1.0, 8.0, 0.02, 0.001, 0.9, 0.5, None, None, None, "T", None, "T", "t.png")
STUDENT = Row("dmd2", "a", "distribution", 4, 1.0, 6.0, 0.01, 0.002, 1.0, 0.1, 0, 640, 10.0, "A", "T", "same", "a.png")
SECOND = replace(STUDENT, run="b", fd=2.0, seed=1, training_seconds=20.0, source="B")


def board(*rows: Row) -> Board:
    return Board(PROTOCOL, rows, {"A": {"method": {"name": "dmd2"}}}, ("cat", "dog"), "classifier@32", 0.5)


def test_a_student_is_compared_with_its_own_teacher_at_equal_steps_and_guidance():
    others = [replace(TEACHER, fd=1.0, **change) for change in ({"steps": 2}, {"guidance": 3.0}, {"source": "U"})]
    shares = {row.run: row.of_teacher for row in board(*others, TEACHER, STUDENT, SECOND).compared().rows if row.run}
    assert shares == {"a": 0.75, "b": 0.25}
    assert board(*others, STUDENT).compared().find(STUDENT.key) == STUDENT


def test_seeds_of_one_setting_get_a_line_of_their_mean_and_spread():
    seeds = board(TEACHER, replace(STUDENT, more={"recall": 0.5}), replace(SECOND, more={"recall": 0.7})).compared()
    told = [line for line in lines(seeds) if line.kind != "teacher"]
    assert [line.kind for line in told] == ["mean", "seed", "seed"]
    mean = dict(zip(head(seeds), told[0].cells, strict=True))
    assert (mean["recall"], told[1].cells[8]) == ("0.600 ± 0.141", "0.5")
    assert mean["fd"] == "4.00 ± 2.83"  # the standard deviation of 6 and 2 is √8
    assert mean["of teacher's"] == "0.50 ± 0.35"
    assert (mean["run"], mean["beats teacher"], mean["training, wall clock"]) == ("mean of 2", "2 of 2", "15 s")


@pytest.mark.parametrize("change", [{"settings": "other"}, {"seed": 0}, {"steps": 2}, {"teacher": "U"}])
def test_other_settings_and_a_run_beside_its_own_export_are_no_seeds(change):
    assert [len(group.rows) for group in grouped([STUDENT, replace(SECOND, **change)])] == [1, 1]


def test_lines_come_by_steps_and_then_by_distance():
    rows = [replace(STUDENT, steps=8, fd=1.0, settings="x"), TEACHER, replace(STUDENT, settings="y"), SECOND]
    told = [(line.cells[2], line.cells[3]) for line in lines(board(*rows).compared())]
    assert told == [("4", "2.00"), ("4", "6.00"), ("4", "8.00"), ("8", "1.00")]


def test_a_line_of_markdown_says_who_won():
    text = markdown(board(TEACHER, STUDENT, replace(SECOND, settings="x", fd=8.5)).compared(), "Emoji")
    assert text.startswith("# Emoji\n\nEvery row: 100 generated images against 100 real ones of emoji32")
    assert "(other real images in their place: fd 0.50)" in text
    row = "| dmd2 | a | 4 | 6.00 | 0.75 | yes | 0.0100 ± 0.0020 | 1.000 | 1 | 0 | 640 | 10 s | 100 ms |"
    assert row in text
    assert "| dmd2 | b | 4 | 8.50 | 1.06 | no |" in text
    assert "| teacher t |  | 4 | 8.00 |  |  | 0.0200 ± 0.0010 | 0.900 | 1 |  |  |  | 500 ms |" in text


def test_a_board_comes_back_from_its_file(tmp_path):
    first = board(TEACHER, replace(STUDENT, accuracy=None)).compared()
    write_board(tmp_path / "report.json", first)
    assert read_board(tmp_path / "report.json") == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_row_measured_again_takes_the_place_of_the_earlier_one():
    merged = board(TEACHER, STUDENT).merged(replace(board(replace(STUDENT, fd=5.0), SECOND), configs={"B": {}}))
    assert [(row.source, row.fd) for row in merged.rows] == [("T", 8.0), ("A", 5.0), ("B", 2.0)]
    assert merged.configs == {"A": {"method": {"name": "dmd2"}}, "B": {}}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(board(), protocol=replace(PROTOCOL, samples=50)), "samples is 100 here and 50 in the earlier one"),
        (replace(board(), protocol=replace(PROTOCOL, seed=1)), "seed is 0 here and 1 in the earlier one"),
        (replace(board(), protocol=replace(PROTOCOL, reference="digits16")), "reference is emoji32 here and digits16"),
        (replace(board(), identity="classifier@64"), "features classifier@32 here and classifier@64 in the earlier"),
    ],
)
def test_rows_measured_otherwise_are_refused(other, said):
    with pytest.raises(UserError, match="report: ") as caught:
        require_same(board(), other)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no report.json that this version"),
        (json.dumps({"rows": []}), "is no report.json that this version"),
        (json.dumps({"rows": [{"method": "dmd2"}]}), "is no report.json that this version"),
    ],
)
def test_a_file_that_is_no_report_is_named(tmp_path, text, said):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_board(path)
    assert str(caught.value).startswith(f"--json: {path}")
    assert said in str(caught.value)
