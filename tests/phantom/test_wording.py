from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mrg_r1.phantom.lexicon import CLAUSE_FRAMES, NORMAL, NOUN_FRAMES, PAIR_FRAMES
from mrg_r1.phantom.sampler import FIVE_FINDINGS, sample_study
from mrg_r1.phantom.traits import sample_traits
from mrg_r1.phantom.wording import SPLITS, think_text, write_report
from tests.phantom.keyword_reader import read_report
from tests.phantom.vocabulary import vocabulary_texts


def sentences(observation: int, value: int, wording: str, count: int = 60) -> list[str]:
    said: list[int | None] = [None] * 14
    said[observation] = value
    return [write_report(said, sample_traits(1, i), np.random.default_rng(i), wording=wording) for i in range(count)]


@pytest.mark.parametrize("value", [1, 0, -1])
@pytest.mark.parametrize("observation", range(13))
def test_every_observation_is_said_in_several_ways_that_the_splits_do_not_share(observation: int, value: int) -> None:
    train, heldout = (set(sentences(observation, value, split)) for split in SPLITS)
    assert len(train) >= 4 and len(heldout) >= 4
    assert not train & heldout
    for sentence in train | heldout:
        assert read_report(sentence) == [value if i == observation else None for i in range(13)], sentence


def test_heldout_wording_shares_no_frame_and_no_sentence_but_nearly_all_words() -> None:
    for frames in (NOUN_FRAMES, CLAUSE_FRAMES):
        for value in (1, 0, -1):
            assert not set(frames["train"][value]) & set(frames["heldout"][value])
    assert not set(PAIR_FRAMES["train"]) & set(PAIR_FRAMES["heldout"]) and not set(NORMAL["train"]) & set(
        NORMAL["heldout"]
    )
    said: dict[str, set[str]] = {}
    words: dict[str, set[str]] = {}
    for split in SPLITS:
        reports = [sample_study("five", 3, index, wording=split).report for index in range(3000)]
        said[split] = {sentence.rstrip(".").lower() for report in reports for sentence in report.split(". ")}
        words[split] = {word for sentence in said[split] for word in sentence.split()}
    assert len(said["train"]) > 500 and len(said["heldout"]) > 500
    assert not said["train"] & said["heldout"]
    assert len(words["heldout"] - words["train"]) <= 2


@pytest.mark.parametrize("wording", ["train", "heldout", "all"])
def test_reports_on_all_thirteen_observations_say_what_they_should(wording: str) -> None:
    for i in range(400):
        rng = np.random.default_rng([5, i])
        said = [[None, 0, 1, -1][rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])] for _ in range(13)]
        said.append(None if any(value in (1, -1) for value in said[:12]) else 1)
        report = write_report(said, sample_traits(0, i), rng, wording=wording)
        assert read_report(report) == said[:13], report


def test_the_vocabulary_covers_every_sentence_that_can_be_sampled() -> None:
    vocabulary = vocabulary_texts()
    assert vocabulary == vocabulary_texts() and len(vocabulary) > 3000
    words = {word.strip(".;") for text in vocabulary for word in text.split()}
    texts = set(vocabulary)
    sampled = [sample_study("five", 0, index, wording="all") for index in range(1500)]
    assert {word.strip(".;") for study in sampled for word in study.report.split()} <= words
    assert {word.strip(".;") for study in sampled for word in think_text(study.said, range(13)).split()} <= words
    singles = [
        sentence
        for observation in FIVE_FINDINGS
        for value in (1, 0, -1)
        for sentence in sentences(observation, value, "all")
    ]
    assert np.mean([sentence in texts for sentence in singles]) > 0.9


def test_a_small_bpe_writes_a_report_in_sixty_tokens() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        vocabulary_texts(), trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False)
    )
    lengths = [len(tokenizer.encode(sample_study("five", 0, index).report).ids) for index in range(3000)]
    assert max(lengths) <= 60 and np.mean(lengths) < 35


def test_think_text_names_what_is_said_and_nothing_else() -> None:
    said: list[int | None] = [None] * 14
    said[1], said[9], said[12] = 1, 0, -1
    assert think_text(said, FIVE_FINDINGS) == "heart enlarged; effusion none; device possible"
    assert think_text(said, (12, 1)) == "device possible; heart enlarged"
    assert think_text([None] * 13 + [1], FIVE_FINDINGS) == "nothing of note"
    thoughts = {think_text([value] * 13 + [None], range(13)) for value in (1, 0, -1)}
    assert len(thoughts) == 3 and all(thought.count(";") == 12 for thought in thoughts)


def test_a_report_without_anything_to_say_is_refused() -> None:
    with pytest.raises(ValueError):
        write_report([None] * 14, sample_traits(0, 0), np.random.default_rng(0))
    only_normal = write_report([None] * 13 + [1], sample_traits(0, 0), np.random.default_rng(0))
    assert "abnormality" in only_normal or "ormal" in only_normal
    with pytest.raises(ValueError, match="14"):
        think_text([None] * 13, FIVE_FINDINGS)
