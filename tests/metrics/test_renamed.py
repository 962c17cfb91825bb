"""Files of version 0.1.0 under today's names."""

from __future__ import annotations

from mrg_r1.metrics.renamed import todays_names


def test_the_judge_is_the_held_out_labeler():
    old = {
        "judge": {"labeler": {"name": "b"}, "disease_micro13": 0.5},
        "judge_disease_micro13": 0.5,
        "rows": [{"judge_labels": [1, None], "judge_reference_labels": [1, 0]}],
        "validation/judge_disease_micro13": 0.5,
    }
    assert todays_names(old) == {
        "held_out": {"labeler": {"name": "b"}, "disease_micro13": 0.5},
        "held_out_disease_micro13": 0.5,
        "rows": [{"held_out_labels": [1, None], "held_out_reference_labels": [1, 0]}],
        "validation/held_out_disease_micro13": 0.5,
    }


def test_everything_else_stays_as_it_is():
    for content in ({"judged": "judge", "text": "judge_labels", "prejudge/x": [1, None]}, None, 3, [True]):
        assert todays_names(content) == content
