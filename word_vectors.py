"""Word vectors that know likeness, from the captions of a run alone: for --text_encoder words.

Words that are said of the same pictures get vectors that are near each other: a U-Net that has learned what a dog looks
like then knows half of what a puppy does.
What it is not: trained by gradients, or an encoder; text_encoder.py adds these vectors to its random ones.

Papers:
  Levy & Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization: singular vectors of mutual information
  Levy, Goldberg & Dagan 2015, Improving Distributional Similarity, section 3: smoothing, square roots of singular values
"""

from collections import Counter
from itertools import chain

import numpy as np
import torch

from text_encoder import hash_of, words_of

LEAST_PICTURES, MOST_WORDS = 5, 4096  # words that get a vector: said of so many pictures, and so many at most
RANK = 128  # directions in which the vectors differ


def learn_word_vectors(captions, dim):
    """Vectors that are near each other for words said of the same pictures -> {"ids": (W,) int64, by hash_of();
    "vectors": (W, dim) float16, of mean square 1, or 0 where nothing is known}.

    captions: a list of strings for each picture. How much more often than by chance two words meet, as its logarithm
    (positive pointwise mutual information), and of that matrix the largest singular vectors (Levy & Goldberg 2014).
    """
    said = [sorted({word for text in several for word in words_of(text)}) for several in captions]
    count = Counter(chain.from_iterable(said)).most_common(MOST_WORDS)
    number = {word: i for i, (word, pictures) in enumerate(count) if pictures >= LEAST_PICTURES}
    meet = torch.zeros(len(number), len(number), dtype=torch.float64)
    for words in said:
        index = torch.tensor([number[word] for word in words if word in number], dtype=torch.long)
        meet[index[:, None], index] += 1
    vectors = main_directions(mutual_information(meet.fill_diagonal_(0)), dim)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-6)  # 0: met nobody, or met all alike
    ids = torch.tensor([hash_of(f"word {word}") for word in number], dtype=torch.long)
    return {"ids": ids, "vectors": (vectors * dim**0.5).half()}


def mutual_information(meet):
    """(W, W) counts of meetings -> log(p(v, w) / (p(v) p(w))), 0 where that is negative or unknown. p(w) to the power of
    0.75 in the columns: rare words would weigh too much (Levy et al. 2015)."""
    p = meet / meet.sum()
    row, column = p.sum(1, keepdim=True), p.sum(0) ** 0.75
    return (p / (row * column / column.sum())).clamp(min=1).log().nan_to_num()


def main_directions(matrix, dim):
    """(W, W) -> (W, dim): rows along the largest singular vectors, about their mean, turned at random within dim."""
    rank = min(RANK, dim, len(matrix))
    u, s, _ = torch.linalg.svd(matrix)
    rows = u[:, :rank] * s[:rank].sqrt()
    turn, _ = torch.linalg.qr(torch.from_numpy(np.random.RandomState(0).randn(dim, rank)))
    return (rows - rows.mean(0)) @ turn.T
