"""What a dying process said: its own words, told from those of its input, and paths cut to their names."""

from __future__ import annotations

import re

_TEXT_MAX = 8 * 1024  # characters of a text that are looked at
_PATH_MAX = 4096

_STOP = r"\s\"'`,;:=()\[\]{}<>|"  # ends a path that is not quoted
_PATH = re.compile(
    r"(?P<quote>[\"'])(?=(?:~|\.\.?)?/)[^\"'\n]*(?=(?P=quote))"  # quoted: it may hold spaces
    rf"|(?<![^{_STOP}])(?:"
    rf"(?:~|\.\.?|(?=/+[^/{_STOP}]+/))/[^{_STOP}]*"  # ~/x, ./x, ../x, /x/y
    rf"|[^/{_STOP}]+(?:/+[^/{_STOP}]+){{2,}}/*"  # x/y/z
    rf"|[^/{_STOP}]+/[^{_STOP}]*\.[A-Za-z][A-Za-z0-9]{{0,5}}"  # x/y.ext; x/y may be a division
    rf")(?=[{_STOP}]|$)"
)

# Lines in which a dying process speaks of itself. Not what() of an exception: it may quote the prompt.
_OWN_WORDS = re.compile(
    r"""
      (?:\S+:\d+:\ )?(?:GGML_ASSERT\(.*\)\ failed|fatal\ error)  # ggml_abort
      # libstdc++: vterminate.cc
    | terminate\ called\ (?:recursively|without\ an\ active\ exception
        |after\ throwing\ an\ instance\ of\ '[^'"]{1,256}')
      # glibc: fortify_fail.c, malloc.c
    | \*\*\*\ [\w ]{1,80}\ \*\*\*:\ terminated
    | (?:double\ free\ or\ corruption|(?:free|malloc|malloc_consolidate|realloc|munmap_chunk)\(\):
        |corrupted\ (?:size\ vs\.\ prev_size|double-linked\ list|unsorted\ chunks))[\w\ .,:!()<>/-]{0,80}
      # CPython: faulthandler.c, traceback.c
    | Fatal\ Python\ error:\ [\w\ ()-]{1,80}
    | (?:Current\ thread|Thread)\ 0x[0-9a-f]{1,16}(?:\ \[.{0,80}\])?\ \(most\ recent\ call\ first\):
    | Stack\ \(most\ recent\ call\ first\):
    | \ \ (?:File\ ".*",\ line\ \d+\ in\ \S+|Binary\ file\ ".*",\ at\ \S+\ \[0x[0-9a-f]+\]|\.\.\.
        |<(?:no\ Python\ frame|truncated\ rest\ of\ calls|tstate\ is\ freed|invalid\ frame)>)
    | Extension\ modules:\ [\w.,\ ():]*
    """,
    re.VERBOSE,
)
# Where what was filled into a message begins: behind a colon, at a quote, or with a path.
_FILLED_IN = re.compile(r": |[\"'`]|(?:^|(?<=\s))(?:~|\.\.?)?/")


def is_own(line: str) -> bool:
    """Whether a line of stderr holds nothing of the input."""
    return bool(_OWN_WORDS.fullmatch(line.removesuffix("\r")))


def parted(text: str) -> tuple[str, str]:
    """Part the text of an abort into the words of its source and the rest, which may be of the input.

    The words are one line with its paths shortened; parting them again changes nothing. GGML_ASSERT and glibc
    say nothing of the input. Of an exception the type is kept, and of any other message what comes before its
    first colon, quote or path. At most 8,192 characters are looked at.
    """
    text = text[:_TEXT_MAX]
    line = text.partition("\n")[0]
    found = None if is_own(line) else _FILLED_IN.search(line)
    end = found.start() if found else len(line)
    return shorten_paths(line[:end]), text[end:]


def shorten_paths(text: str) -> str:
    """Replace each path in a text by its base name. ``n_tokens/n_seqs``, as in an assertion, stays."""
    return _PATH.sub(_shorten, text)


def base_name(path: str) -> str:
    """The last part of a path of any length; empty for a root."""
    return path.rstrip("/")[-_PATH_MAX:].rpartition("/")[2]


def _shorten(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    return quote + base_name(found[0].removeprefix(quote))
