"""What a reader sees of a text: whole characters, nothing of a stop string, and in the end all of it."""

from __future__ import annotations

import itertools
import threading

from hypothesis import example, given
from hypothesis import strategies as st

from crumplezone.workers.generate.requests.made import Made
from crumplezone.workers.protocol.generate.messages import Progress

LETTERS = st.text("a\u2603", min_size=1, max_size=4)  # few, so that stop strings come
WRONG = st.sampled_from([b"\xe2\x98", b"\xff", b"\xf0\x9f"])
RAW = st.lists(st.one_of(LETTERS.map(str.encode), LETTERS.map(str.encode), WRONG), min_size=1)


def pieces_of(raw: bytes, cuts: list[int], stops: list[str]) -> tuple[Made, list[str]]:
    """Fed in these cuts, read after each."""
    made = Made(stops)
    pieces = []
    bounds = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    for begin, end in itertools.pairwise(bounds):
        made.take(Progress(0, [], raw[begin:end]))
        pieces.append(made.unread())
        assert made.unread() == ""
    made.end("length")
    return made, [*pieces, made.unread()]


def expected(raw: bytes, stops: list[str]) -> tuple[str, str | None]:
    """Looked for byte after byte: the first stop string that is complete, the longest of those."""
    for end in range(len(raw) + 1):
        found = [stop for stop in stops if raw[:end].endswith(stop.encode())]
        if found:
            stop = max(found, key=len)
            return raw[: end - len(stop.encode())].decode("utf-8", "replace"), stop
    return raw.decode("utf-8", "replace"), None


@example("a\u2603a".encode(), [], ["a\u2603a", "\u2603"])  # the second is complete before the first
@given(RAW.map(b"".join), st.lists(st.integers(0, 200)), st.lists(LETTERS, max_size=3))
def test_in_whatever_cuts_it_comes(raw: bytes, cuts: list[int], stops: list[str]) -> None:
    made, pieces = pieces_of(raw, cuts, stops)
    text, stop = expected(raw, stops)
    assert "".join(pieces) == made.text == text
    assert (made.stop, made.finish_reason) == (stop, "length" if stop is None else "stop")
    for n in range(len(pieces)):  # what is shown is never taken back
        assert text.startswith("".join(pieces[:n]))


def test_what_might_become_a_stop_string_is_held_back_until_it_cannot() -> None:
    made = Made(["<end>", "\n\n"])
    for fed, shown in (("one <e", "one "), ("x", "<ex"), ("\n", ""), ("\n more", ""), ("<end>", "")):
        made.take(Progress(0, [], fed.encode()))
        assert made.unread() == shown
    made.end("length")
    assert (made.text, made.stop, made.unread()) == ("one <ex", "\n\n", "")


def test_half_a_character_waits_for_its_end() -> None:
    made = Made([])
    for fed, shown in ((b"a\xe2", "a"), (b"\x98", ""), (b"\x83b\xf0\x9f", "\u2603b")):
        made.take(Progress(0, [], fed))
        assert made.unread() == shown
    made.end("stop")
    assert made.unread() == "\ufffd"


def test_what_was_held_back_comes_in_the_end() -> None:
    made = Made(["<end>"])
    made.take(Progress(0, [], b"\xe2\x98\x83 <en"))
    assert made.unread() == "\u2603 "
    made.end("timeout")
    assert made.unread() == "<en"
    made.end("stop")
    made.take(Progress(0, [5], b"late"))
    assert (made.text, made.tokens, made.finish_reason) == ("\u2603 <en", [], "timeout")


def test_who_waits_is_told_of_news_once() -> None:
    made = Made([])
    told: list[int] = []
    made.on_news(lambda: told.append(1))
    made.take(Progress(0, [], b""))
    made.take(Progress(0, [], b"a"))
    assert told == [1]
    made.on_news(lambda: told.append(2))  # there is something unread
    assert told == [1, 2]
    made.unread()
    bell = threading.Event()
    made.on_news(bell.set)
    made.forget(bell.set)
    made.end("stop")
    assert not bell.is_set()
    made.on_news(bell.set)
    assert bell.is_set()
