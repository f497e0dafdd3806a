"""Text to numbers: its words or characters, and where its parts begin. It is read once, and held as numbers only.

word    what whitespace separates; each line ends in <eos>, a file's last one, too
char    the characters as they are, line ends among them

The vocabulary is that of the training text, the most frequent first, equals in the order of their code points. What a
test text has beside it becomes <unk>, if the training text has that word.

Parts are the first of these that the training text has:

articles        each begins with a title as WikiText has them, " = Title = " between blank lines
turns           of speakers: at least half of the paragraphs begin with a line "NAME:", as in a play
paragraphs      between blank lines
lines           of a text of one paragraph, as the Penn Treebank

A part's label is its title or its speaker; of paragraphs and lines it is the file. What comes before the first title or
speaker of a file is a part of its own, and has the file for its label."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from mpiclip.errors import InputError

LEVELS = ("word", "char")
EOS, UNK = "<eos>", "<unk>"
PIECE = 1 << 20     # bytes of a long line that are read at a time
BLOCK = 1 << 18     # tokens that are numbered at a time
TITLE = re.compile(r"\s*= (?!= )(.{1,200})(?<! =) =\s*")
SPEAKER = re.compile(r"\s*([^:\s][^:]{,60}):\s*")

Opened = Callable[[str], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Parts:
    """Part k of a text is tokens starts[k]:starts[k+1], and its label is names[labels[k]]."""

    kind: str               # articles, turns, paragraphs or lines
    starts: np.ndarray      # (P+1,) int64
    labels: np.ndarray      # (P,) int32
    names: list[str]        # in the order in which they appear


def encode(sources: Iterable[str], level: str, opened: Opened) -> tuple[np.ndarray, list[str], Parts]:
    """The training text, all sources one after the other: (tokens (T,), vocabulary, parts). `opened` opens a source.
    InputError names the source and what is wrong with it."""
    numbers, outline = _Growing(), _Outline()
    blocks = _numbered(sources, level, opened, numbers, outline)
    words = list(numbers)
    counts = np.zeros(len(words), np.int64)
    for block in blocks:
        counts += np.bincount(block, minlength=len(words))
    order = sorted(range(len(words)), key=lambda k: (-counts[k], words[k]))
    place: np.ndarray = np.empty(len(words), _smallest(len(words)))
    place[order] = np.arange(len(words))
    tokens = _joined(blocks, place)
    return tokens, [words[k] for k in order], outline.parts(len(tokens))


def encode_test(sources: Iterable[str], level: str, opened: Opened, vocabulary: list[str]) -> tuple[np.ndarray, int]:
    """The test text as numbers of the training text's vocabulary: (tokens (T,), how many of them stand for a word that
    is not in it)."""
    numbers = _Known({word: k for k, word in enumerate(vocabulary)})
    blocks = _numbered(sources, level, opened, numbers)
    return _joined(blocks, np.arange(len(vocabulary)).astype(_smallest(len(vocabulary)))), numbers.missing


class _Growing(dict):
    """A number for each word that is asked for."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class _Known(dict):
    """The numbers of the words that there are; <unk> for all others."""

    missing = 0

    def __missing__(self, word: str) -> int:
        if UNK not in self:
            raise KeyError(word)
        self.missing += 1
        return self[UNK]


def _numbered(sources, level, opened, numbers, outline=None) -> list[np.ndarray]:
    """The tokens as `numbers` has them, in blocks."""
    blocks: list[np.ndarray] = []
    done = 0

    def number(source, units) -> int:
        try:
            block = np.fromiter(map(numbers.__getitem__, units), np.int32, len(units))
        except KeyError as error:
            raise InputError(f"{source}: the {'word' if level == 'word' else 'character'} {error.args[0]!r} is not in "
                             f"the training text; nor is {UNK}, which would take its place") from None
        blocks.append(block.astype(_smallest(len(numbers))))
        return len(units)

    for source in sources:
        units: list[str] = []
        before, whole = done, True
        if outline:
            outline.source(source, done)
        with opened(source) as file:
            for line in _lines(file, source):
                if outline and whole:
                    outline.line(line, done + len(units))
                whole = line.endswith("\n")
                units += line.split() if level == "word" else line
                if level == "word" and whole:
                    units.append(EOS)
                if len(units) >= BLOCK:
                    done, units = done + number(source, units), []
        if level == "word" and not whole:
            units.append(EOS)
        done += number(source, units)
        if done - before < 2:
            raise InputError(f"{source}: found a text of {done - before} tokens, expected at least two")
    return blocks


def _lines(file: BinaryIO, source: str) -> Iterator[str]:
    """The lines of a file; a very long one in pieces, cut between words."""
    held, offset = b"", 0
    while piece := file.readline(max(PIECE, len(held))):
        held += piece
        cut = len(held) if held.endswith(b"\n") else held.rfind(b" ") + 1
        if cut:
            yield _decoded(held[:cut], offset, source)
            held, offset = held[cut:], offset + cut
    if held:
        yield _decoded(held, offset, source)


def _decoded(line: bytes, offset: int, source: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: the byte at offset {offset + error.start} is {line[error.start]:#04x}, and not "
                         "UTF-8; expected a text in UTF-8") from None
    if "\0" in text:
        raise InputError(f"{source}: the byte at offset {offset + line.index(0)} is NUL; expected a text in UTF-8")
    return text if offset else text.removeprefix("\ufeff")


class _Outline:
    """What is seen of a text's parts as its lines pass by. All positions are tokens from the beginning."""

    def __init__(self):
        self.sources: list[str] = []
        self.opening: list[int] = []                            # where each source begins
        self.paragraphs, self.lines = array("q"), array("q")    # where these begin; a source's first ones where it does
        self.titles: dict[int, str] = {}                        # of paragraphs, by where they begin
        self.speakers: dict[int, str] = {}
        self._title: str | None = None                          # one if the next line is blank
        self._fresh = self._below_blank = True

    def source(self, name: str, at: int) -> None:
        """Here a source begins."""
        self.sources.append(name)
        self.opening.append(at)
        self._title, self._fresh, self._below_blank = None, True, True

    def line(self, text: str, at: int) -> None:
        """Here a line begins, and this is it."""
        if text.isspace():
            if self._title is not None:
                self.titles[self.paragraphs[-1]] = self._title
            self._title, self._below_blank = None, True
            return
        at, self._title = self.opening[-1] if self._fresh else at, None
        self.lines.append(at)
        if self._below_blank:
            self.paragraphs.append(at)
            if found := TITLE.fullmatch(text):
                self._title = found[1]
            elif found := SPEAKER.fullmatch(text):
                self.speakers[at] = found[1]
        self._fresh = self._below_blank = False

    def parts(self, total: int) -> Parts:
        """The parts of these `total` tokens."""
        spoken = self.speakers and 2 * len(self.speakers) >= len(self.paragraphs)
        if self.titles or spoken:
            named = dict(zip(self.opening, self.sources, strict=True)) | (self.titles or self.speakers)
            kind, starts, numbers = "articles" if self.titles else "turns", np.array(sorted(named)), _Growing()
            labels = np.array([numbers[named[at]] for at in starts])
            names = list(numbers)
        else:
            kind = "paragraphs" if len(self.paragraphs) > len(self.sources) else "lines"
            starts = np.union1d(self.opening, self.paragraphs if kind == "paragraphs" else self.lines)
            labels, names = np.searchsorted(self.opening, starts, side="right") - 1, self.sources
        return Parts(kind, np.append(starts, total), labels.astype(np.int32), names)


def _smallest(count: int) -> type:
    """The type of the numbers below `count`."""
    for dtype in (np.uint8, np.uint16, np.int32):
        if count - 1 <= np.iinfo(dtype).max:
            return dtype
    raise InputError(f"vocabulary: found {count} different words, expected at most {2**31}")


def _joined(blocks: list[np.ndarray], place: np.ndarray) -> np.ndarray:
    """The blocks one after the other, with place[k] for each k. Each is let go of as soon as it is copied."""
    tokens, at = np.empty(sum(map(len, blocks)), place.dtype), 0
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        tokens[at : at + len(block)] = place[block]
        at += len(block)
    return tokens
