"""Refusals of an SGLang scheduler, on their way to who has asked it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gms_core.errors import EngineBusy, EngineUnsupported, GmsError, OutOfMemory
from gms_sglang import sleep_answers
from gms_sglang.refusals import as_error, read, told, written


def test_refusal_is_the_same_error_when_it_was_told() -> None:
    error = as_error(told(OutOfMemory("no room", hint="Wait.")))
    assert (type(error), str(error)) == (OutOfMemory, "no room. Wait.")
    assert isinstance(read(written(told(EngineBusy("it computes")))), EngineBusy)


def test_error_that_was_not_expected_is_logged_where_it_was_raised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = as_error(told(ZeroDivisionError("by zero")))
    assert type(error) is GmsError
    assert "ZeroDivisionError: by zero" in str(error)
    assert "ZeroDivisionError" in caplog.text


def release(answers: list[GmsError | None], **options: object) -> int:
    """Ask schedulers that answer so, one after the other; returns how often they were asked."""
    asked: list[object] = []

    async def communicator(request: object) -> list[Any]:
        asked.append(request)
        answer = answers[min(len(asked), len(answers)) - 1]
        return [SimpleNamespace(rid=None), SimpleNamespace(rid=None if answer is None else written(told(answer)))]

    record = SimpleNamespace(**options)
    tokenizer = SimpleNamespace(auto_create_handle_loop=lambda: None, release_memory_occupation_communicator=communicator, server_args=record)
    hook: Callable[..., Any] = sleep_answers.HOOKS[0].function
    asyncio.run(hook(None, tokenizer, "a request", None))
    return len(asked)


def test_request_is_done_when_no_scheduler_refuses() -> None:
    assert release([None]) == 1


def test_request_fails_when_one_scheduler_refuses() -> None:
    with pytest.raises(OutOfMemory, match="no room"):
        release([OutOfMemory("no room"), None])


def test_request_is_asked_again_when_an_engine_has_only_just_answered() -> None:
    assert release([EngineBusy("it computes"), EngineBusy("it computes"), None]) == 3


def test_request_fails_when_an_engine_goes_on_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep_answers, "PATIENCE_S", 0.05)
    with pytest.raises(EngineBusy):
        release([EngineBusy("it computes")])


def test_request_is_refused_when_replicas_cannot_agree() -> None:
    with pytest.raises(EngineUnsupported, match="--dp-size"):
        release([None], dp_size=2)
    assert release([None], dp_size=2, enable_dp_attention=True) == 1


def test_request_is_refused_when_stages_cannot_agree() -> None:
    with pytest.raises(EngineUnsupported, match="--pipeline-parallel-size"):
        release([None], pp_size=2)


def test_refusal_is_logged_once_when_an_engine_goes_on_computing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sleep_answers, "PATIENCE_S", 0.05)
    with pytest.raises(EngineBusy):
        release([EngineBusy("it computes")])
    assert caplog.text.count("refused") == 1
