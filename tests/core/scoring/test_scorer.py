import pytest
import torch

from denserl_cli.core.data.batches import SequenceBatch, collate_sequences
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.recipe.schema import SegmentationConfig
from denserl_cli.core.scoring.scorer import Scorer
from denserl_cli.core.segmentation import segment_ends
from tests.tiny import causal_lm, frozen, scalar_model


@pytest.fixture
def batch() -> SequenceBatch:
    return collate_sequences([[3, 4], [5]], [[6, 7, 8, 9, 2], [10, 2]], pad_id=0)


def test_one_call_gives_segments_likelihoods_and_values(batch: SequenceBatch):
    reference, reward_model = causal_lm(), scalar_model(1)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(reference, batch)
        values = token_values(reward_model, batch)
    assert entropy is not None
    cutoff = entropy[0, :4].median().item()  # so that some tokens are surprising, some are not
    segmentation = SegmentationConfig("segment", cutoff)
    found = Scorer(segmentation, reference=frozen(reference), reward_model=frozen(reward_model))(
        batch
    )
    for got, expected in (
        (found.reference_logprobs, logprobs),
        (found.entropy, entropy),
        (found.token_values, values),
    ):
        assert got is not None and torch.equal(got, expected) and not got.requires_grad
    ends = segment_ends(entropy, batch.response_mask, granularity="segment", cutoff=cutoff)
    assert torch.equal(found.ends, ends)
    assert 1 < ends[0].sum() < 4


def test_what_is_not_there_is_not_computed(batch: SequenceBatch):
    token = Scorer(SegmentationConfig("token"), reference=None, reward_model=frozen(scalar_model()))
    found = token(batch)
    assert found.entropy is None and found.reference_logprobs is None
    assert found.token_values is not None
    assert found.ends.tolist() == [[True] * 4 + [False], [True] + [False] * 4]
    bandit = Scorer(SegmentationConfig("bandit"), reference=None)(batch)
    assert bandit.token_values is None
    assert bandit.ends.tolist() == [[False] * 4 + [True], [False, True] + [False] * 3]


def test_a_response_that_was_cut_has_no_terminator(batch: SequenceBatch):
    scorer = Scorer(SegmentationConfig("token"), reference=None)
    ends = scorer(batch, torch.tensor([True, False])).ends
    assert ends.tolist() == [[True] * 4 + [False], [True, True] + [False] * 3]


def test_the_temperature_changes_likelihoods_and_no_entropies(batch: SequenceBatch):
    scorer = Scorer(SegmentationConfig("segment", 1.9), reference=frozen(causal_lm()))
    plain, tempered = scorer(batch), scorer(batch, temperature=0.5)
    assert plain.entropy is not None and tempered.entropy is not None
    assert plain.reference_logprobs is not None and tempered.reference_logprobs is not None
    torch.testing.assert_close(plain.entropy, tempered.entropy)
    assert torch.equal(plain.ends, tempered.ends)
    assert not torch.allclose(plain.reference_logprobs, tempered.reference_logprobs)


def test_segments_need_a_cutoff(batch: SequenceBatch):
    with pytest.raises(DenserlError, match="cutoff"):
        Scorer(SegmentationConfig("segment"), reference=frozen(causal_lm()))(batch)
