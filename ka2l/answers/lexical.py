"""Compares two short answers by their words, numbers and dates."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ka2l.answers.normalise import Date, Number, Token, dates_agree, singular, surface_key, tokenize

_FILLERS = frozenset(
    str.split(
        "the a an of in on at by is was were are be been being it its he she his her they their that this these those "
        "there as which who i think answer according about around approximately roughly nearly circa exactly utc gmt "
        "ad ce monday tuesday wednesday thursday friday saturday sunday mr mrs ms dr sir jr"
    )
)
_VERBS = frozenset(map(singular, str.split("is was were are has had have did does do be been began")))
#: Words that turn what they stand beside into another thing, or list several things: never mere detail.
_CRUCIAL = frozenset(
    str.split(
        "and or not no never none neither nor non without except than vice square cubic nautical light per half "
        "new old north south east west northern southern eastern western great upper lower"
    )
)
#: Words that say a range; told apart from the numbers they stand between by nothing else.
_RANGE = frozenset(str.split("to between from through until"))
#: Short forms of given names, as tokens.
_GIVEN_NAMES = {
    singular(short): singular(full)
    for full, shorts in {
        "abraham": "abe", "alexander": "alex", "andrew": "andy", "anthony": "tony", "benjamin": "ben benny",
        "charles": "charlie chuck", "christopher": "chris", "daniel": "dan danny", "david": "dave davy",
        "donald": "don donnie", "douglas": "doug", "edward": "ed eddie", "elizabeth": "liz lizzie",
        "frederick": "fred freddie", "gregory": "greg", "james": "jim jimmy", "jeffrey": "jeff",
        "jennifer": "jen jenny", "john": "johnny", "joseph": "joe joey", "katherine": "kate kathy katie",
        "kenneth": "ken kenny", "lawrence": "larry", "margaret": "maggie peggy", "matthew": "matt",
        "michael": "mike", "nicholas": "nick", "peter": "pete", "philip": "phil", "raymond": "ray",
        "richard": "rick dick rich", "robert": "bob bobby rob robbie", "ronald": "ron ronnie", "samuel": "sam sammy",
        "stephen": "steve steven", "susan": "sue", "theodore": "theo", "thomas": "tom tommy", "timothy": "tim",
        "walter": "walt", "william": "will bill billy",
    }.items()
    for short in shorts.split()
}  # fmt: skip


def same_answer(question: str, left: str, right: str) -> bool:
    """Whether two short answers to a question say the same, judged by their words, numbers and dates alone.

    They do when they share all tokens in any order, or when one only adds detail to the other: a unit (``5 miles``,
    ``5``), the fields of a date, a middle name, the region of a place (``Austin, Texas``), a title before a name, or
    the words of the question around it in a full sentence. Initials, acronyms and short forms of given names stand for
    what they shorten, and ranges of the same numbers are one. Words that make a difference (``not``, ``north``,
    ``and``) and further numbers are never detail.
    """
    a, b = _contentful(tokenize(left)), _contentful(tokenize(right))
    if not a or not b:
        return surface_key(left) == surface_key(right)
    if _same_tokens(a, b) or _same_letters(a, b) or _same_letters(tokenize(left), tokenize(right)):
        return True
    if _same_figures(a, b) or _is_acronym(left, right) or _is_acronym(right, left):
        return True
    asked = frozenset(tokenize(question))
    short, long, text = (a, b, right) if len(a) <= len(b) else (b, a, left)
    if _adds_detail(asked, short, long, text):
        return True
    return _in_sentence(asked, a, b, left) or _in_sentence(asked, b, a, right)


def answer_marks(answer: str) -> frozenset[tuple[str, object]]:
    """What an answer can be found by: answers with no mark in common are never the same, whatever the question.

    One look at each answer settles most pairs so, and only the others need :func:`same_answer`. Every way in which that
    may say yes leaves a mark: an agreeing word, number or field of a date, the same letters, an acronym.
    """
    words = tokenize(answer)
    content = _contentful(words)
    marks: set[tuple[str, object]] = set()
    for token in content:
        if isinstance(token, Date):
            for reading in token.readings:
                marks |= {("number", reading.year), ("month", reading.month), ("day", reading.day)}
        else:
            marks.add(("number", token.value) if isinstance(token, Number) else ("word", token))
    for tokens in (content, words):
        if not _figures(tokens):
            marks.add(("letters", "".join(map(str, tokens))))
            if len(tokens) > 1:
                marks.add(("letters", "".join(str(t)[0] for t in tokens)))
    return frozenset(mark for mark in marks if mark[1] not in (None, ""))


def _contentful(tokens: tuple[Token, ...]) -> list[Token]:
    content = [t for t in tokens if t not in _FILLERS]
    return content or list(tokens)


def _agree(left: Token, right: Token) -> bool:
    if isinstance(left, Date) and isinstance(right, Date):
        return dates_agree(left, right)
    if isinstance(left, Date) and isinstance(right, Number):
        return any(r.year == right.value for r in left.readings)
    if isinstance(left, Number) and isinstance(right, Date):
        return _agree(right, left)
    return left == right


def _same_letters(a: Sequence[Token], b: Sequence[Token]) -> bool:
    """Whether the words agree once written together: ``head-up``, ``headup``. Digits stay apart: ``1 2``, ``12``."""
    joined = ["".join(t if isinstance(t, str) else "0" for t in tokens) for tokens in (a, b)]
    return joined[0] == joined[1] and not any(c.isdigit() for c in joined[0])


def _surplus(short: list[Token], long: list[Token]) -> list[Token] | None:
    """What is left of ``long`` without ``short``'s tokens, or None where it does not hold them all."""
    rest = list(long)
    for token in short:
        index = next((i for i, other in enumerate(rest) if _agree(token, other)), None)
        if index is None:
            return None
        del rest[index]
    return rest


def _same_tokens(a: list[Token], b: list[Token]) -> bool:
    return _surplus(_listed(a), _listed(b)) == []


def _listed(tokens: list[Token]) -> list[Token]:
    """The tokens without the words that only join them."""
    has_range = len(_figures(tokens)) > 1
    return [t for t in tokens if t != "and" and not (has_range and t in _RANGE)]


def _figures(tokens: Sequence[Token]) -> list[Token]:
    return [t for t in tokens if not isinstance(t, str)]


def _same_figures(a: list[Token], b: list[Token]) -> bool:
    """Whether one answer is several numbers or dates and the other states just these: ``1881-1885``, ``started in 1881
    and finished in 1885``."""
    figures = (_figures(a), _figures(b))
    if min(map(len, figures)) < 2 or _surplus(*sorted(figures, key=len)) != []:
        return False
    words = [set(_listed(tokens)) - set(found) for tokens, found in zip((a, b), figures, strict=True)]
    return not all(words) and _CRUCIAL.isdisjoint(words[0] | words[1])


def _is_acronym(short: str, long: str) -> bool:
    """Whether ``short`` is one word of capitals, or of three letters, that begin the words of ``long``."""
    letters = tokenize(short)
    if len(letters) != 1 or not isinstance(letters[0], str) or len(letters[0]) < (2 if short.isupper() else 3):
        return False
    words = [tokenize(long), _contentful(tokenize(long))]
    return any(len(w) > 1 and letters[0] == "".join(str(t)[0] for t in w) and not _figures(w) for w in words)


def _is_detail(surplus: list[Token]) -> bool:
    return all(isinstance(t, str) and t not in _CRUCIAL for t in surplus)


def _adds_detail(asked: frozenset[Token], short: list[Token], long: list[Token], long_text: str) -> bool:
    """Whether ``long`` is ``short`` with a unit, a title, middle names, or a region or gloss set off by punctuation."""
    surplus = _surplus(short, long)
    if surplus is None:
        return _same_name(short, long)
    segments = [s for s in re.split(r"[,(\[;:]", long_text) if tokenize(s)]
    if len(segments) == 2 and any(_same_tokens(short, _contentful(tokenize(s))) for s in segments):
        return "or" not in surplus and "not" not in surplus
    if not _is_detail(surplus):
        return False
    if isinstance(short[0], Number):
        return len(surplus) <= 3 and any(isinstance(t, Number) for t in long[:2])
    if asked.issuperset(surplus):
        return True
    starts = _agrees_at(short, long, 0) and len(short) > 1
    ends = _agrees_at(short, long, len(long) - len(short))
    return starts or ends or _same_name(short, long)


def _same_name(short: list[Token], long: list[Token]) -> bool:
    """First and last word alike, those between left out or cut to initials: ``J. R. R. Tolkien``, ``John Tolkien``."""
    if not 2 <= len(short) <= len(long) <= 5 or not _agree(short[-1], long[-1]) or not _is_detail(short + long):
        return False
    first = str(short[0])
    if len(short) == 2 and 1 < len(first) == len(long) - 1 and first == "".join(str(t)[0] for t in long[:-1]):
        return True  # J.R.R. Tolkien: initials without blanks between them are read as one word
    rest = iter(str(t) for t in long[:-1])
    names = [str(t) for t in short[:-1]]
    if not _initial_agrees(names[0], str(long[0])):
        return False
    return all(any(_initial_agrees(name, other) for other in rest) for name in names)


def _initial_agrees(a: str, b: str) -> bool:
    return _GIVEN_NAMES.get(a, a) == _GIVEN_NAMES.get(b, b) or (min(len(a), len(b)) == 1 and a[0] == b[0])


def _agrees_at(short: list[Token], long: list[Token], start: int) -> bool:
    window = long[start : start + len(short)]
    return len(window) == len(short) and all(map(_agree, short, window))


def _in_sentence(asked: frozenset[Token], sentence: list[Token], answer: list[Token], sentence_text: str) -> bool:
    """Whether a full sentence states the answer and nothing that contradicts it."""
    words = tokenize(sentence_text)
    if not (len(words) >= 4 and not _VERBS.isdisjoint(words)) and len(sentence) <= 6:
        return False
    core = [t for t in sentence if t not in asked]
    if core and (_same_tokens(core, answer) or _adds_detail(asked, core, answer, "")):
        return True
    start = next((i for i in range(len(sentence)) if _agrees_at(answer, sentence, i)), None)
    if start is None:
        return False
    rest = [t for t in sentence[:start] + sentence[start + len(answer) :] if t not in asked]
    numeric = any(not isinstance(t, str) for t in answer)
    return not any(t in _CRUCIAL - {"and"} or (numeric and not isinstance(t, str)) for t in rest)
