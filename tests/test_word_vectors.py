"""Promises of word_vectors.py: likeness out of captions alone, by the formulas, and no numbers that mean nothing."""

import math
import random

import pytest
import torch

from text_encoder import WordHashTextEncoder, hash_of
from word_vectors import learn_word_vectors, mutual_information


def test_words_said_of_the_same_pictures_have_vectors_near_each_other():
    """Three subjects with twenty words each, of which a caption has any four: two words of one subject seldom meet."""
    rng, subjects = random.Random(0), [[f"w{s}x{i}" for i in range(20)] for s in range(3)]
    captions = [[" ".join(rng.sample(words, 4))] for words in subjects for _ in range(60)]
    encoder = WordHashTextEncoder(8, 4, words=learn_word_vectors(captions, 8))
    learned = torch.stack([encoder.learned[hash_of(f"word {word}")].float() for words in subjects for word in words])
    assert torch.allclose(learned.pow(2).mean(1), torch.ones(60), atol=0.01)  # as large as a random vector
    alike = (learned @ learned.T / 8).view(3, 20, 3, 20).mean((1, 3))
    assert alike.diagonal().min() > 0.5 and alike.sum() - alike.diagonal().sum() < 0
    assert torch.equal(learn_word_vectors(captions, 8)["vectors"], encoder.words["vectors"])


def test_half_of_a_known_words_vector_is_learned_and_unknown_words_keep_theirs():
    words = learn_word_vectors([["a dog"], ["a cat"], ["the dog"], ["the cat"]] * 5, 512)
    encoder, plain = WordHashTextEncoder(words=words), WordHashTextEncoder()
    assert torch.equal(encoder(["zebra"]), plain(["zebra"])) and encoder.key() != plain.key()
    assert 0.6 < torch.cosine_similarity(encoder.vector("word dog"), plain.vector("word dog"), 0) < 0.8  # half: 0.71


def test_mutual_information_is_that_of_the_counts():
    """Words 0 and 1 meet twice, 1 and 2 once; by hand, with p(w) to the power of 0.75 in the columns."""
    found = mutual_information(torch.tensor([[0.0, 2, 0], [2, 0, 1], [0, 1, 0]], dtype=torch.float64))
    p, smooth = [2 / 6, 3 / 6, 1 / 6], sum(x**0.75 for x in (2 / 6, 3 / 6, 1 / 6))
    for v, w, together in ((0, 1, 2 / 6), (2, 1, 1 / 6), (1, 0, 2 / 6)):
        assert math.isclose(found[v, w], math.log(together / (p[v] * p[w] ** 0.75 / smooth)))
    assert found[0, 2] == 0 == found[0, 0]


@pytest.mark.parametrize(
    "captions",
    [
        [],
        [["a dog"]],
        [["same"]] * 9,
        [["a red dog"]] * 9,
        [[""]] * 9,
        [["\u7ea2\u8272\u6c7d\u8f66\u3002"], ["\u96ea"]] * 9,
    ],
)
def test_from_few_or_equal_captions_come_no_numbers_that_mean_nothing(captions):
    """Nothing, one picture, one word, all alike, empty, Chinese."""
    encoder = WordHashTextEncoder(16, 4, words=learn_word_vectors(captions, 16))
    embedded = encoder([text for several in captions for text in several] + ["a red dog"])
    assert embedded.isfinite().all() and embedded[-1, :3].std(1).min() > 0.3
    assert encoder.words["vectors"].shape == (len(encoder.words["ids"]), 16)
