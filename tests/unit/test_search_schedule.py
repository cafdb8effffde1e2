"""Numbers of tokens at which candidates are judged, and the options of a search."""

from typing import Any

import pytest

from flextok_pl.search.options import SearchOptions
from flextok_pl.search.schedule import token_counts


def test_counts() -> None:
    assert token_counts("geometric", 32, 256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert token_counts("geometric", 32, 48) == [1, 2, 4, 8, 16, 32, 48]
    assert token_counts("geometric", 32, 1) == [1]
    assert token_counts("linear", 32, 256) == [32 * i for i in range(1, 9)]
    assert token_counts("linear", 5, 12) == [5, 10, 12]
    assert token_counts("linear", 20, 12) == [12]
    assert token_counts([1, 4, 9], 32, 12) == [1, 4, 9]
    assert SearchOptions(max_tokens=32).counts(256) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("schedule", [[], [0, 2], [2, 2], [4, 2], [1, 13], [1.5], "square"])
def test_no_schedule(schedule: Any) -> None:
    with pytest.raises(ValueError, match="schedule="):
        token_counts(schedule, 32, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "greedy"}, "algorithm='greedy' is unknown"),
        ({"branch": "first"}, "branch='first' is unknown"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"beam_width": 0}, "beam_width=0"),
        ({"lookahead": 0}, "lookahead=0"),
        ({"decode_batch_size": 0}, "decode_batch_size=0"),
        ({"num_results": 1.5}, "num_results=1.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 0.0, "distinct": False}, "set distinct=true"),
        ({"vary_noise": True}, "vary_noise=true with algorithm='beam'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


@pytest.mark.parametrize("most", [0, 13])
def test_more_tokens_than_the_prior_has(most: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens={most} is not in 1..12"):
        SearchOptions(max_tokens=most).counts(12)
