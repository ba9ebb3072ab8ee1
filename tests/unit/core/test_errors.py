from __future__ import annotations

import pickle

import pytest

from qwen_ray.core.errors import (
    CheckpointError,
    ContextLengthExceeded,
    DeadlineExceeded,
    Overloaded,
    PlanRefused,
    QwenRayError,
    RankFailed,
    SettingsError,
    UnknownModel,
)


@pytest.mark.parametrize(
    "error",
    [
        RankFailed(3, "gone"),
        UnknownModel("x", ["demo"]),
        Overloaded("full", retry_after=2.0),
        ContextLengthExceeded("too long"),
        DeadlineExceeded("too late"),
        PlanRefused("too big", inequality="2 > 1"),
        SettingsError("wrong", field="http.port"),
        CheckpointError("missing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_processes_whole(error: QwenRayError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert vars(there) == vars(error)
