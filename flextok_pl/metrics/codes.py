"""Statistics of token ids: the use of the vocabulary, and the information in each position.

N samples, K positions, V vocabulary. Entropies are plug-in estimates: with N samples none exceeds log2 N.
"""

import torch
from torch import Tensor

from flextok_pl.precision import accumulation_dtype


def distinct_tokens(tokens: Tensor) -> int:
    """Number of different ids among (N, K) tokens."""
    return len(torch.unique(tokens))


def codebook_use(tokens: Tensor, vocab_size: int) -> float:
    """Fraction of the vocabulary that occurs at least once among (N, K) tokens."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"tokens span {int(tokens.min())}..{int(tokens.max())}, outside vocab_size={vocab_size}")
    return distinct_tokens(tokens) / vocab_size


def position_entropy(tokens: Tensor) -> Tensor:
    """Entropy in bits of the ids at each position: (N, K) int64 -> (K,) float64, or the device's widest type."""
    count, positions = tokens.shape
    wide = accumulation_dtype(tokens.device)
    offset = torch.arange(positions, device=tokens.device) * (int(tokens.max()) + 1)
    pairs, occurrences = torch.unique(tokens + offset, return_counts=True)
    share = occurrences.to(wide) / count
    position = torch.bucketize(pairs, offset, right=True) - 1
    return torch.zeros(positions, dtype=wide, device=tokens.device).index_add_(0, position, -share * share.log2())


def class_information(tokens: Tensor, labels: Tensor, permutations: int = 20, seed: int = 0) -> Tensor:
    """Mutual information in bits between the class and the id at each position, corrected for few samples.

    (N, K) and (N,) int64 -> (K,) float64; samples of class -1 are left out. It is about zero for ids independent of the
    class, and at most the entropy of the classes. The plug-in estimate H(id) + H(class) - H(id, class) is far above
    zero even for independent ids, because most occur once. So its mean over permutations of the labels is subtracted.
    """
    tokens, labels = tokens[labels >= 0], labels[labels >= 0]
    if len(labels) == 0:
        raise ValueError("no sample has a class, so class information is undefined")
    _, dense = torch.unique(tokens, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)

    def joint_entropy(of: Tensor) -> Tensor:
        return position_entropy(dense * (int(labels.max()) + 1) + of[:, None])

    orders = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(permutations)]
    # H(id) and H(class) are the same for every order of the labels, so they cancel.
    return torch.stack([joint_entropy(labels[order]) for order in orders]).mean(0) - joint_entropy(labels)


def perplexity(tokens: Tensor) -> float:
    """2 to the entropy of the ids over all positions: the size of an equally unpredictable uniform vocabulary."""
    return float(2 ** position_entropy(tokens.reshape(-1, 1)).item())
