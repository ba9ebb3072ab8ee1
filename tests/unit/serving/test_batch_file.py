"""A batch's files: what is refused, what is taken up again, and that each answer stands there once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.serving.batch_file import Answers, BadBatch, answer_line, read_requests


def request(custom_id: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {}})


def answer(custom_id: str, status: int = 200) -> str:
    return answer_line(custom_id, {"status_code": status, "request_id": "x", "body": {}})


def test_requests_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{request('a')}\n\n  {request('ü')}\r\n".encode())
    assert [(one.number, one.custom_id) for one in read_requests(path)] == [(1, "a"), (3, "ü")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ("[" * 100_000, "line 2: is nested too deeply"),
        (request(""), "line 2: custom_id must be a string that is not empty"),
        (request(3), "line 2: custom_id must be a string that is not empty, got 3"),
        (request("a"), "line 2: custom_id 'a' is line 1's already"),
    ],
)
def test_what_cannot_be_answered_once_is_refused_by_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{request('a')}\n{line}\n{request('b')}\n")
    with pytest.raises(BadBatch, match=re.escape(says)):
        read_requests(path)


def test_bytes_that_are_no_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xff\n")
    with pytest.raises(BadBatch, match="line 1: 'utf-8'"):
        read_requests(path)
    with pytest.raises(BadBatch, match="cannot be read"):
        read_requests(tmp_path / "other")


def test_many_wrong_lines_are_not_all_shown(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("?\n" * 30)
    with pytest.raises(BadBatch, match=r"line 10: .*; and 20 lines more"):
        read_requests(path)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=4), unique=True, max_size=5),
    torn=st.integers(0, 400),
)
def test_wherever_it_was_torn_off_whole_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], torn: int
) -> None:
    path = tmp_path_factory.mktemp("batch") / "out.jsonl"
    with Answers(path) as answers:
        for custom_id in ids:
            answers.add({custom_id: answer(custom_id)})
    data = path.read_bytes()[:torn]
    path.write_bytes(data)
    with Answers(path) as answers:
        assert answers.custom_ids == set(ids[: data.count(b"\n")])
        answers.add({one: answer(one) for one in ids if one not in answers.custom_ids})
    assert [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()] == ids


def test_failed_answers_are_counted_over_several_runs(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Answers(path) as answers:
        answers.add({"a": answer("a", 404), "b": answer("b")})
        assert answers.num_failed == 1
    with Answers(path) as answers:
        answers.add({"c": answer("c", 400)})
        assert answers.num_failed == 2


@pytest.mark.parametrize("content", ["my notes", request("a") + "\n", f"{answer('a')}\nnotes\n"])
def test_another_file_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(BadBatch, match="is no answer of a batch"):
        Answers(path)
    assert path.read_text() == content


def test_answers_of_another_batch_are_told(tmp_path: Path) -> None:
    requests, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(request("a"))
    with Answers(path) as answers:
        answers.add({"b": answer("b")})
        with pytest.raises(BadBatch, match="custom_id 'b'"):
            answers.check(read_requests(requests), path)


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_ray.serving.batch_file.LOCK_SECONDS", 0.0)
    path = tmp_path / "out.jsonl"
    with Answers(path), pytest.raises(BadBatch, match="being written by another batch"):
        Answers(path)
    with pytest.raises(BadBatch, match="cannot be written"):
        Answers(tmp_path)
