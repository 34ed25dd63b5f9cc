"""What a student learns from its teacher's self-attention: relations of tokens, and maps.

With A the queries, keys or values of one block, split anew into H heads of d channels each:

    relations   1 / (H N)  sum_h,n KL(R^T_hn || R^S_hn)        R_h = softmax(A_h A_h^T / sqrt(d)), row n
                mean over queries, keys and values of one block (Wang et al., "MiniLMv2: Multi-Head Self-Attention
                Relation Distillation", 2021, section 3.1, which adds the three up)
    attention   1 / (H N)  sum_h,n KL(M^T_hn || M^S_hn)        M the attention maps, mean over the blocks
                (Wang et al., "MiniLM", 2020, section 3.1; Jiao et al., "TinyBERT", 2020, section 3, takes the squared
                distance of the scores before their softmax, which also counts what no softmax sees)

over the N tokens that are no padding, each looking at such tokens only. Relations see whole rows in causal models too:
they compare states, and nothing is predicted from them. Both are computed in float32 from what the layers q, k and v
give out, so that the models themselves may go by a fused kernel.

Shape suffixes: B rows, H heads, T tokens, D channels of a head, C channels of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.models.self_attention import MASKED, MapRule
from gossamer.train.objectives import Seen


@dataclass(frozen=True)
class Related:
    """Name a layer of the student and one of the teacher whose outputs relate tokens alike, and the relation heads."""

    student: str
    teacher: str
    heads: int


@dataclass(frozen=True)
class Mapped:
    """Name the layers (q, k) of the student's and the teacher's attention, and how each makes its map."""

    student: tuple[str, str]
    teacher: tuple[str, str]
    student_rule: MapRule
    teacher_rule: MapRule


@dataclass(frozen=True)
class Relations:
    """Follow how the teacher's queries, keys and values relate tokens to each other."""

    pairs: Sequence[Related]
    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean divergence in nats over heads, tokens and layers."""
        found = []
        for pair in self.pairs:
            ours_BTC, theirs_BTC = seen.student_layers[pair.student], seen.teacher_layers[pair.teacher]
            with torch.autocast(ours_BTC.device.type, enabled=False):
                ours, theirs = relations(ours_BTC, pair.heads), relations(theirs_BTC, pair.heads)
                found.append(map_divergence(theirs, ours, seen.lengths.real(ours_BTC.shape[1], ours_BTC.device)))
        return torch.stack(found).mean()


@dataclass(frozen=True)
class Maps:
    """Follow the teacher's attention maps."""

    pairs: Sequence[Mapped]
    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean divergence in nats over heads, tokens and blocks."""
        found = []
        for pair in self.pairs:
            q, k = (seen.student_layers[name] for name in pair.student)
            with torch.autocast(q.device.type, enabled=False):
                ours = pair.student_rule.scores(q.float(), k.float())
                theirs = pair.teacher_rule.scores(*(seen.teacher_layers[name].float() for name in pair.teacher))
                found.append(map_divergence(theirs, ours, seen.lengths.real(q.shape[1], q.device)))
        return torch.stack(found).mean()


def relations(values_BTC: Tensor, heads: int) -> Tensor:
    """Return the scores of each pair of tokens [B, H, T, T] before their softmax, in float32.

    >>> relations(torch.eye(2)[None], 1)[0, 0].mul(2**0.5).round().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    values_BHTD = values_BTC.float().reshape(*values_BTC.shape[:2], heads, -1).transpose(1, 2)
    return values_BHTD @ values_BHTD.transpose(-1, -2) / math.sqrt(values_BHTD.shape[-1])


def map_divergence(theirs_BHTT: Tensor, ours_BHTT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Return the mean KL of the softmax of our scores from that of theirs, in nats, over heads and real tokens."""
    if real_BT is not None:
        theirs_BHTT, ours_BHTT = (
            scores.masked_fill(~real_BT[:, None, None], MASKED) for scores in (theirs_BHTT, ours_BHTT)
        )
    log_p, log_q = theirs_BHTT.log_softmax(-1), ours_BHTT.log_softmax(-1)
    each_BTH = (log_p.exp() * (log_p - log_q)).sum(-1).transpose(1, 2)
    return each_BTH.mean() if real_BT is None else each_BTH[real_BT].mean()
