from __future__ import annotations

import io
import json
import logging

import pytest

from qwen_ray.core.logs import REQUEST_ID, JsonFormatter, handler, one_line


@pytest.fixture
def lines() -> tuple[logging.Logger, io.StringIO]:
    written = io.StringIO()
    ours = handler("ingress one")
    assert isinstance(ours, logging.StreamHandler)
    ours.setStream(written)
    logger = logging.Logger("qwen_ray.test")
    logger.addHandler(ours)
    return logger, written


def test_a_client_cannot_forge_a_line(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = lines
    forged = "x\n2026-01-01 00:00:00,000 ERROR ingress one qwen_ray: all is lost\r\x1b[2J\x9b\u2028\u202e\ud800\x00\x7f"
    logger.info("no model %s", forged)
    logger.info("%s", {"forged": forged})
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("failed on %s", forged)
    shown = written.getvalue()
    assert (
        sum("INFO" in line or line.split()[2:3] == ["ERROR"] for line in shown.split("\n") if line[:1].isdigit()) == 3
    )
    assert all(line.isprintable() for line in shown.split("\n"))
    assert all(line[:1].isdigit() or line.startswith("  ") for line in shown.rstrip("\n").split("\n"))
    assert shown.count("INFO ingress one qwen_ray.test: ") == 2
    assert r"\n2026-01-01" in shown


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcdef123456",
        "{'authorization': 'Bearer abcdef123456'}",
        "api_key=abcdef123456",
        '"api-key": "abcdef123456"',
        "token=abcdef123456 refused",
        "password: abcdef123456",
        "key qr-abcdef1234567890abcdef",
        "https://host/?token=abcdef123456&x=1",
        "hf_abcdef1234567890abcdef",
    ],
)
def test_secrets_are_blotted_out(text: str) -> None:
    assert "abcdef" not in one_line(text)
    assert "[redacted]" in one_line(text)


def test_ordinary_lines_stay() -> None:
    for text in ("max_tokens=16, stop_token_ids=(1, 2)", "token 5 of 16", "Grüße, 世界! 👋", "42 API keys now", "\\n"):
        assert one_line(text) == text


def json_lines(log: logging.Logger) -> list[dict[str, object]]:
    ours = log.handlers[0]
    assert isinstance(ours, logging.StreamHandler)
    return [json.loads(line) for line in ours.stream.getvalue().splitlines()]


def test_json_is_one_line_in_ascii_whatever_a_client_wrote(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = lines
    logger.handlers[0].setFormatter(JsonFormatter("ingress one"))
    forged = 'x"}\n{"level":"error"}\r\x1b[2J\x9b\u2028\u202e\ud800\x00\x7f'
    logger.warning("no model %s", forged, extra={"fields": {"model": forged, "level": "debug", "seconds": 0.5}})
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("api_key=abcdef123456")
    assert written.getvalue().isascii()
    assert all(line.isprintable() for line in written.getvalue().splitlines())
    first, second = json_lines(logger)
    assert (first["level"], first["process"], first["logger"]) == ("warning", "ingress one", "qwen_ray.test")
    assert (first["message"], first["model"], first["seconds"]) == (f"no model {forged}", forged, 0.5)
    assert str(first["time"]).endswith("Z")
    assert "abcdef" not in str(second["message"])
    assert "ValueError" in str(second["exception"])


@pytest.mark.parametrize("as_json", [False, True])
def test_the_request_stands_in_every_record(lines: tuple[logging.Logger, io.StringIO], as_json: bool) -> None:
    logger, written = lines
    if as_json:
        logger.handlers[0].setFormatter(JsonFormatter("ingress one"))
    token = REQUEST_ID.set("req-1")
    logger.info("working")
    REQUEST_ID.reset(token)
    logger.info("idle")
    working, idle = written.getvalue().splitlines()
    assert ('"request_id":"req-1"' if as_json else "[req-1] working") in working
    assert "req" not in idle
