"""Which forwards answer a list of requests: prefixes once, similar lengths together.

Requests become a tree of at most three levels, each one forward of a batch, but that answers of
different lengths are several:

    shots      what the questions of a family share (the solved examples before them)
    questions  the rest of each context
    answers    each continuation but its last token

Example: four one-letter answers to each of 50 questions after the same five shots are one row of
shots and 50 rows of questions; the letters are scored at the questions' last tokens. Four endings
of one sentence are a row of the sentence and four rows of endings. Where nothing is shared, a
request is one row. All of it is arithmetic on token ids: every rank makes the same plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ultramem_ds.harness.requests import Request, Tokens

MIN_SHOTS = 32  # tokens that must be shared before a forward of their own is spent on them
REACH = 8  # rows times columns of a forward's keys, in forwards of the largest size

SHOTS, QUESTIONS, ANSWERS = range(3)  # forwards from ANSWERS on all continue the questions

# Answers are padded to the longest of their forward. Those shorter than this share of it get one
# of their own, if both have so many tokens: a forward costs something by itself.
ALIKE = 0.75
WORTH_A_FORWARD = 256


@dataclass(frozen=True)
class Pick:
    """One scored token: the logits after a row's token give the probability of the next."""

    row: int
    column: int
    target: int  # token id
    request: int  # index into the requests


@dataclass
class Level:
    """One forward of a batch.

    Attributes:
        rows: tokens of each row.
        owners: the row of the level before that each row continues; empty for the first level.
        picks: what is scored.
    """

    rows: list[Tokens] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    picks: list[Pick] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Levels by number, those without rows left out; from ``ANSWERS`` on all are answers."""

    levels: dict[int, Level]


@dataclass(frozen=True)
class _Question:
    """Requests with one context."""

    context: Tokens
    requests: list[int]  # with this context
    answers: tuple[Tokens, ...]  # distinct continuations without their last token, no empty one

    @property
    def is_single(self) -> bool:
        """Whether one row holds context and continuation."""
        return len(self.answers) == 1 and len(self.requests) == 1


@dataclass(frozen=True)
class _Piece:
    """Questions of one family that go into the same batch."""

    num_shared: int  # tokens of the shots
    questions: list[_Question]

    def sizes(self) -> list[tuple[int, int, int]]:
        """Rows, widest row and most columns seen: of shots, questions and all answers."""
        tails = [len(q.context) - self.num_shared for q in self.questions]
        widths = [
            tail + (len(q.answers[0]) if q.is_single else 0)
            for tail, q in zip(tails, self.questions)
        ]
        answers = [a for q in self.questions if not q.is_single for a in q.answers]
        longest = max((len(a) for a in answers), default=0)
        width = max(widths)
        return [
            (int(self.num_shared > 0), self.num_shared, self.num_shared),
            (len(self.questions), width, self.num_shared + width),
            (len(answers), longest, self.num_shared + max(tails) + longest),
        ]


def plan_batches(requests: Sequence[Request], max_tokens: int) -> list[Batch]:
    """Batches whose forwards have at most ``max_tokens`` tokens, padding included.

    A row that is longer by itself is a forward of its own. The largest come first.
    """
    pieces: list[_Piece] = []
    for num_shared, questions in _families(_questions(requests)):
        pieces += _cut(num_shared, questions, max_tokens)
    pieces.sort(key=_likeness)
    batches: list[Batch] = []
    chosen: list[_Piece] = []
    for piece in reversed(pieces):
        mixed = chosen and (chosen[0].num_shared > 0) != (piece.num_shared > 0)
        if chosen and (mixed or not _fits([*chosen, piece], max_tokens)):
            batches.append(_batch(chosen, requests))
            chosen = []
        chosen.append(piece)
    if chosen:
        batches.append(_batch(chosen, requests))
    return batches


def _likeness(piece: _Piece) -> tuple[bool, int, int, int]:
    """Neighbours in this order pad each other least: in answers first, which are most tokens."""
    _, (_, question_width, _), (_, answer_width, _) = piece.sizes()
    return piece.num_shared > 0, piece.num_shared, answer_width, question_width


def _questions(requests: Sequence[Request]) -> list[_Question]:
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_context[tuple(request.context)].append(index)
    found = []
    for context in sorted(by_context):
        members = by_context[context]
        heads = {tuple(requests[i].continuation[:-1]): None for i in members}
        heads.pop((), None)
        found.append(_Question(context, members, tuple(heads)))
    return found


def _common(a: Tokens, b: Tokens, limit: int) -> int:
    """Tokens that both begin with, at most ``limit``."""
    limit = min(limit, len(a), len(b))
    if tuple(a[:limit]) == tuple(b[:limit]):
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


def _families(questions: list[_Question]) -> Iterator[tuple[int, list[_Question]]]:
    """Neighbours in order of their tokens that share the larger part; tokens shared, questions.

    At least one token of each context stays outside: the shots are no question themselves.
    """
    family: list[_Question] = []
    shared = 0
    for question in questions:
        if family:
            # The last token of the shortest context is not shared.
            limit = min(shared, len(question.context) - 1)
            common = _common(family[0].context, question.context, limit)
            shortest = min(len(family[-1].context), len(question.context))
            if common >= MIN_SHOTS and 2 * common >= shortest:
                family.append(question)
                shared = common
                continue
            yield (shared if len(family) > 1 else 0), family
        family, shared = [question], len(question.context) - 1
    if family:
        yield (shared if len(family) > 1 else 0), family


def _cut(num_shared: int, questions: list[_Question], max_tokens: int) -> Iterator[_Piece]:
    """Pieces of a family that fit one forward, similar lengths together."""
    chosen: list[_Question] = []
    for question in sorted(questions, key=lambda q: len(q.context), reverse=True):
        if chosen and not _fits([_Piece(num_shared, [*chosen, question])], max_tokens):
            yield _Piece(num_shared, chosen)
            chosen = []
        chosen.append(question)
    yield _Piece(num_shared, chosen)


def _fits(pieces: Sequence[_Piece], max_tokens: int) -> bool:
    for sizes in zip(*(piece.sizes() for piece in pieces)):
        rows = sum(size[0] for size in sizes)
        width, columns = max(size[1] for size in sizes), max(size[2] for size in sizes)
        if rows * width > max_tokens or (rows > 1 and rows * columns > REACH * max_tokens):
            return False
    return True


def _batch(pieces: Sequence[_Piece], requests: Sequence[Request]) -> Batch:
    levels = [Level() for _ in (SHOTS, QUESTIONS, ANSWERS)]
    for piece in pieces:
        begin = piece.num_shared
        if begin:
            levels[SHOTS].rows.append(piece.questions[0].context[:begin])
        for question in piece.questions:
            if begin:
                levels[QUESTIONS].owners.append(len(levels[SHOTS].rows) - 1)
            _add_question(levels, question, begin, requests)
    forwards = [*levels[:ANSWERS], *_by_length(levels[ANSWERS])]
    return Batch({number: level for number, level in enumerate(forwards) if level.rows})


def _by_length(answers: Level) -> Iterator[Level]:
    """Answers cut into forwards of similar lengths, the longest first."""
    order = sorted(range(len(answers.rows)), key=lambda row: len(answers.rows[row]), reverse=True)
    chosen: list[int] = []
    left = sum(map(len, answers.rows))  # tokens that no forward has yet
    for row in order:
        length = len(answers.rows[row])
        if chosen:
            width = len(answers.rows[chosen[0]])
            enough = min(left, width * len(chosen)) >= WORTH_A_FORWARD
            if enough and length < ALIKE * width:
                yield _only(answers, chosen)
                chosen = []
        chosen.append(row)
        left -= length
    if chosen:
        yield _only(answers, chosen)


def _only(level: Level, rows: Sequence[int]) -> Level:
    """Some rows of a level, numbered anew."""
    numbers = {row: number for number, row in enumerate(rows)}
    return Level(
        [level.rows[row] for row in rows],
        [level.owners[row] for row in rows],
        [replace(pick, row=numbers[pick.row]) for pick in level.picks if pick.row in numbers],
    )


def _add_question(
    levels: list[Level], question: _Question, begin: int, requests: Sequence[Request]
) -> None:
    row = len(levels[QUESTIONS].rows)
    tokens = tuple(question.context[begin:])
    last = len(tokens) - 1
    answer_rows: dict[Tokens, int] = {}
    if question.is_single:
        tokens += tuple(question.answers[0])
    else:
        for answer in question.answers:
            answer_rows[answer] = len(levels[ANSWERS].rows)
            levels[ANSWERS].rows.append(answer)
            levels[ANSWERS].owners.append(row)
    levels[QUESTIONS].rows.append(tokens)
    for index in question.requests:
        first, *rest = requests[index].continuation
        levels[QUESTIONS].picks.append(Pick(row, last, first, index))
        for place, target in enumerate(rest):
            if question.is_single:
                levels[QUESTIONS].picks.append(Pick(row, last + 1 + place, target, index))
            else:
                answer_row = answer_rows[tuple(requests[index].continuation[:-1])]
                levels[ANSWERS].picks.append(Pick(answer_row, place, target, index))
