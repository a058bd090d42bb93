"""Losses: what is not known asks for nothing."""

from __future__ import annotations

import math

import pytest
import torch

from monai_mamba.errors import DatasetError
from monai_mamba.training.losses import MultiLabelLoss, SingleLogitLoss, classification_loss

NAN = math.nan


def test_multi_label_loss_is_binary_cross_entropy_where_all_is_known():
    logits, label = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, label.float())
    torch.testing.assert_close(classification_loss([], 3, multi_label=True)(logits, label), expected)


def test_unknown_labels_have_no_gradient_and_the_others_keep_theirs():
    logits = torch.randn(2, 3, requires_grad=True)
    label = torch.tensor([[1, NAN, 0], [NAN, NAN, NAN]])
    loss = MultiLabelLoss()(logits, label)
    loss.backward()
    known = ~label.isnan()
    assert (logits.grad[~known] == 0).all()
    whole = logits.detach().requires_grad_()
    MultiLabelLoss()(whole, torch.nan_to_num(label)).backward()
    torch.testing.assert_close(logits.grad[known], whole.grad[known])  # as much as if the others were known
    assert (logits.grad[known] != 0).all()
    nothing = MultiLabelLoss()(logits, torch.full((2, 3), NAN))
    assert float(nothing) == 0


def test_shares_of_a_batch_with_unknown_labels_add_up():
    logits, label = torch.randn(4, 3), torch.tensor([[1, NAN, 0]] * 2 + [[0, 1, 1]] * 2)
    loss = MultiLabelLoss()
    parts = (loss(logits[:2], label[:2]) + loss(logits[2:], label[2:])) / 2
    torch.testing.assert_close(loss(logits, label), parts)


@pytest.mark.parametrize("label", [2, [0, 1]], ids=["third", "several"])
def test_one_logit_refuses_more_than_two_classes(label):
    with pytest.raises(DatasetError, match=r"case a: `label` must be 0 or 1 for a network with one logit"):
        SingleLogitLoss([{"case": "a", "label": label}])
