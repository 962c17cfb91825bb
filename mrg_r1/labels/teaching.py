"""What teachers give: labelers trained alike from other first weights, whose averaged answers one model learns beside
the labels.

Several small models of a few thousand reports err differently, and their average reads better than each. One model that
learns the average keeps that, in one file and at one model's time of reading. On texts of a third of IU X-Ray's reports
that the others lack, three models reach a micro-F1 of 0.783, 0.765 and 0.767, their average 0.795, and the one model
that they taught 0.802 (one seed).

Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mrg_r1.labels import inference
from mrg_r1.labels.chexbert import CheXbert

LABELS_SHARE = 0.3  # of the labels in what is learned; the rest is the teachers'
TEACHER_COST = 0.3  # the time of one teacher's answer, of a training step without teachers


def average_answer(
    teachers: Sequence[CheXbert], rows: Sequence[Sequence[int]], *, pad: int, device: torch.device
) -> Tensor:
    """The mean of the teachers' probabilities of each observation's classes: [N, 14, 4], of N rows of ids in
    any order.
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    packed = inference.pack([rows[row] for row in order], pad=pad, slack=inference.SLACK["cuda"], device=device)
    sorted_answer = torch.stack([inference.read(teacher, packed).softmax(dim=-1) for teacher in teachers]).mean(dim=0)
    answer = torch.empty_like(sorted_answer)
    answer[torch.tensor(order, device=device)] = sorted_answer
    return answer


def taught_loss(logits: Tensor, classes: Tensor, answer: Tensor) -> Tensor:
    """Sum of the 14 cross-entropies to the labels and to the teachers' answer, averaged over the reports.

    Args:
        logits: [N, 14, 4], -inf for the classes that an observation lacks.
        classes: [N, 14] labels.
        answer: [N, 14, 4] probabilities, 0 where the logits are -inf.
    """
    target = LABELS_SHARE * nn.functional.one_hot(classes, logits.shape[-1]) + (1 - LABELS_SHARE) * answer
    lacking = logits.isneginf()  # 0 * -inf is no number
    return -(target * logits.log_softmax(dim=-1).masked_fill(lacking, 0.0)).sum() / len(logits)
