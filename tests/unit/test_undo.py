"""The undo stack."""

from __future__ import annotations

import pytest

from gms_core.errors import DriverError, OutOfMemory
from gms_core.vmm.undo import UndoStack


def fail(message: str) -> None:
    raise DriverError(message)


def test_inverses_run_newest_first_when_the_block_fails() -> None:
    done: list[int] = []

    def block() -> None:
        with UndoStack() as undo:
            for number in range(3):
                undo.push(done.append, number)
            raise OutOfMemory("no room")

    with pytest.raises(OutOfMemory, match="no room"):
        block()
    assert done == [2, 1, 0]


def test_inverses_run_when_the_block_ends_without_commit() -> None:
    done: list[str] = []
    with UndoStack() as undo:
        undo.push(done.append, "undone")
    assert done == ["undone"]


def test_nothing_is_undone_when_the_block_commits() -> None:
    done: list[str] = []
    with UndoStack() as undo:
        undo.push(done.append, "undone")
        undo.commit()
    assert done == []


def test_only_later_inverses_run_when_the_block_fails_after_commit() -> None:
    done: list[str] = []

    def block() -> None:
        with UndoStack() as undo:
            undo.push(done.append, "before")
            undo.commit()
            undo.push(done.append, "after")
            raise OutOfMemory("no room")

    with pytest.raises(OutOfMemory):
        block()
    assert done == ["after"]


def test_first_error_is_raised_with_notes_when_inverses_fail_too() -> None:
    done: list[str] = []

    def block() -> None:
        with UndoStack() as undo:
            undo.push(done.append, "first")
            undo.push(fail, "cuMemUnmap failed")
            undo.push(fail, message="cuMemRelease failed")
            raise OutOfMemory("no room")

    with pytest.raises(OutOfMemory, match="no room") as raised:
        block()
    assert done == ["first"]
    assert raised.value.__notes__ == [
        "while undoing, fail failed: DriverError: cuMemRelease failed",
        "while undoing, fail failed: DriverError: cuMemUnmap failed",
    ]


def test_first_failure_is_raised_with_notes_when_only_inverses_fail() -> None:
    done: list[str] = []

    def block() -> None:
        with UndoStack() as undo:
            undo.push(done.append, "first")
            undo.push(fail, "first")
            undo.push(fail, "second")

    with pytest.raises(DriverError, match="second") as raised:
        block()
    assert done == ["first"]
    assert raised.value.__notes__ == ["while undoing, fail failed: DriverError: first"]


def test_inverses_run_when_the_process_is_interrupted() -> None:
    done: list[str] = []

    def block() -> None:
        with UndoStack() as undo:
            undo.push(done.append, "undone")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["undone"]


def test_nothing_is_undone_when_the_owner_has_what_was_done_already_and_an_interrupt_comes_before_commit() -> None:
    done: list[str] = []
    owned: list[str] = []

    def block() -> None:
        with UndoStack(kept=lambda: bool(owned)) as undo:
            undo.push(done.append, "undone")
            owned.append("it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == []
    owned.clear()
    with UndoStack(kept=lambda: bool(owned)) as undo:
        undo.push(done.append, "undone")
    assert done == ["undone"]
