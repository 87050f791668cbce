"""The plan of a list of requests: every token once, prefixes shared, forwards of bounded size."""

import random

import pytest

from ultramem_ds.harness.plan import ANSWERS, QUESTIONS, SHOTS, plan_batches
from ultramem_ds.harness.requests import Cuts, Request

SHOT = tuple(range(100, 140))


def letters(number):
    """One question after the shots, with four one-token answers."""
    return [Request((*SHOT, number, 7, 8), (letter,)) for letter in (1, 2, 3, 4)]


def endings(number):
    """One sentence with two endings of several tokens."""
    return [Request((number, 5, 6), (1, 2, 3)), Request((number, 5, 6), (4, 2))]


def paths(batch):
    """Request -> the tokens that its scored positions see and predict, from the plan alone."""
    found = {}
    for number, level in batch.levels.items():
        for pick in level.picks:
            tokens, row, here = (), pick.row, number
            prefix = tuple(level.rows[row][: pick.column + 1])
            while batch.levels[here].owners:
                row = batch.levels[here].owners[row]
                here = max(n for n in batch.levels if n < min(here, ANSWERS))
                tokens = tuple(batch.levels[here].rows[row]) + tokens
            found.setdefault(pick.request, []).append((tokens + prefix, pick.target))
    return found


def expected(request):
    whole = tuple(request.context) + tuple(request.continuation)
    first = len(request.context)
    return [(whole[:end], whole[end]) for end in range(first, len(whole))]


def test_every_scored_token_is_predicted_from_all_tokens_before_it():
    draw = random.Random(0)
    requests = [r for n in range(30) for r in letters(n)]
    requests += [r for n in range(20) for r in endings(n)]
    requests += [
        Request(
            tuple(draw.randrange(9) for _ in range(draw.randint(1, 60))),
            tuple(draw.randrange(9) for _ in range(draw.randint(1, 6))),
        )
        for _ in range(200)
    ]
    draw.shuffle(requests)
    found = {}
    for batch in plan_batches(requests, 256):
        for request, path in paths(batch).items():
            assert request not in found
            found[request] = path
    assert len(found) == len(requests)
    for index, request in enumerate(requests):
        assert sorted(found[index]) == sorted(expected(request))


def test_shots_are_one_row_and_letters_none():
    (batch,) = plan_batches([r for n in range(10) for r in letters(n)], 4096)
    assert [tuple(row) for row in batch.levels[SHOTS].rows] == [SHOT]
    assert len(batch.levels[QUESTIONS].rows) == 10
    assert ANSWERS not in batch.levels
    assert len(batch.levels[QUESTIONS].picks) == 40


def test_endings_continue_one_row_per_question():
    (batch,) = plan_batches([r for n in range(10) for r in endings(n)], 4096)
    assert SHOTS not in batch.levels
    assert [tuple(row) for row in batch.levels[QUESTIONS].rows[:1]] == [(9, 5, 6)]
    assert len(batch.levels[ANSWERS].rows) == 20
    assert {tuple(row) for row in batch.levels[ANSWERS].rows} == {(1, 2), (4,)}


def test_questions_whose_endings_are_alike_go_together():
    """By the length of the sentence a batch would mix long and short endings."""
    draw = random.Random(2)
    requests = []
    for number in range(60):
        context = (number, *(draw.randrange(50) for _ in range(draw.randint(5, 30))))
        width = draw.choice((4, 24))
        requests += [Request(context, (ending, *range(width))) for ending in range(4)]
    draw.shuffle(requests)
    batches = plan_batches(requests, 512)
    levels = [level for b in batches for n, level in b.levels.items() if n >= ANSWERS]
    padded = sum(len(level.rows) * max(map(len, level.rows)) for level in levels)
    assert padded <= 1.25 * sum(len(row) for level in levels for row in level.rows)


def test_endings_of_one_question_that_differ_in_length_are_forwards_of_their_own():
    lengths = [100] * 8 + [20] * 30
    requests = [Request((5, 6), (ending, *range(n))) for ending, n in enumerate(lengths)]
    (batch,) = plan_batches(requests, 4096)
    widths = {number: {len(row) for row in level.rows} for number, level in batch.levels.items()}
    assert widths == {QUESTIONS: {2}, ANSWERS: {100}, ANSWERS + 1: {20}}
    found = paths(batch)
    for index, request in enumerate(requests):
        assert sorted(found[index]) == sorted(expected(request))


@pytest.mark.parametrize("max_tokens", [64, 300, 5000])
def test_forwards_stay_within_the_budget(max_tokens):
    draw = random.Random(1)
    requests = [
        Request(tuple(draw.randrange(50) for _ in range(draw.randint(1, 60))), (1, 2, 3))
        for _ in range(100)
    ]
    for batch in plan_batches(requests, max_tokens):
        for level in batch.levels.values():
            width = max(len(row) for row in level.rows)
            assert len(level.rows) == 1 or width * len(level.rows) <= max_tokens


def test_what_is_cut_is_counted():
    cuts = Cuts()
    request = Request(tuple(range(10)), (90, 91))
    assert cuts.fit("short", request, 11) == request  # 12 tokens, of which the last is not read
    assert cuts.fit("long", request, 8) == Request(tuple(range(3, 10)), (90, 91))
    assert cuts.fit_prompt("long", tuple(range(10)), 4, 12) == (tuple(range(2, 10)), 4)
    assert cuts.fit_prompt("much", (1, 2), 100, 12) == ((1, 2), 6)
    assert cuts.asked == {"short": 1, "long": 2, "much": 1}
    assert (cuts.truncated, cuts.shortened) == ({"long": 2}, {"much": 1})
    with pytest.raises(ValueError, match="an answer of 2 tokens does not fit the model's 1"):
        cuts.fit("none", request, 1)
