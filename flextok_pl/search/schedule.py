"""Choose the numbers of tokens at which candidates are scored."""

from flextok_pl.contracts import is_whole


def token_counts(schedule: str | list[int], tokens_per_step: int, most: int) -> list[int]:
    """Numbers of tokens after each step of a search, ascending.

    Args:
        schedule: `geometric` for 1, 2, 4, ... up to `most`, `linear` for multiples of `tokens_per_step` up to `most`,
            or the numbers themselves.
        tokens_per_step: step of the linear schedule.
        most: most tokens of a sequence.

    Raises:
        ValueError: the schedule is unknown, empty, not ascending, or outside 1..most.
    """
    if schedule == "geometric":
        return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    if schedule == "linear":
        return [*range(tokens_per_step, most, tokens_per_step), most]
    if isinstance(schedule, str):
        raise ValueError(f"schedule={schedule!r} is unknown; use 'geometric', 'linear' or a list of numbers of tokens")
    counts = list(schedule)
    ascending = all(is_whole(count) for count in counts) and counts == sorted(set(counts))
    if not counts or not ascending or not 1 <= counts[0] <= counts[-1] <= most:
        raise ValueError(f"schedule={counts} must be ascending numbers of tokens in 1..{most}")
    return counts
