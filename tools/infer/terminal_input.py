"""What a person types in `infer chat`: lines with editing, history and several lines a message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shared.console import log

_MOST = 1 << 20  # bytes of the history; a larger one begins anew


def history_file() -> Path:
    """Of the XDG base directory specification: state that is kept between runs."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "baton" / "infer-chat-history"


def messages(history: Path) -> Iterator[str]:
    """Each message; the end of the input (Ctrl-D) ends them.

    Enter sends. Alt-Enter or a backslash before Enter begin a new line, and what is pasted keeps its lines. Ctrl-C
    drops what is typed. Arrows walk through earlier messages, those of earlier runs in `history` included.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what Enter is while a reply is printed, for who types ahead
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept: History = InMemoryHistory()
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        if history.is_file() and history.stat().st_size > _MOST:
            history.unlink()
        history.touch(mode=0o600)
        kept = FileHistory(str(history))
    except OSError as error:
        log(f"no history is kept: {history}: {error.strerror}")
    session: PromptSession[str] = PromptSession(
        "> ", multiline=True, prompt_continuation="  ", key_bindings=keys, history=kept
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
