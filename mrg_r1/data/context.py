"""What a prompt says of a study besides its images: why it was made, what it was compared with, and the report of the
one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mrg_r1.types import Study

# data.context's names
TITLES = {"indication": "Indication", "comparison": "Comparison", "prior_report": "Prior report"}


def context_lines(study: Study, fields: Sequence[str]) -> dict[str, str]:
    """Field -> its line of the prompt, in the order of `fields`; nothing for what the study does not have."""
    values = {"indication": study.indication, "comparison": study.comparison, "prior_report": study.prior_report}
    return {field: f"\n{TITLES[field]}: {value}" for field in fields if (value := values[field])}


def with_prior_reports(studies: Sequence[Study]) -> list[Study]:
    """The studies with `prior_report` filled in, the report of the study that `prior` names; those without a prior stay
    as they are.

    A prior may stand in any split. The report of an earlier examination is known when the next one is read, so one of
    the test split is context of another like any other: what must not be seen is a study's own reference, and nothing
    is learned from a prompt's tokens.

    Args:
        studies: all of a manifest, every split (`read_manifest` has checked that each prior is there and of the same
            patient).

    Raises:
        ValueError: no study has a prior; priors that lead back to where they began (one of them lies later); a prior
            that shows one of the study's own images, so that its report is the study's own.
    """
    by_id = {study.id: study for study in studies}
    if not any(study.prior for study in studies):
        raise ValueError(
            "no study names a prior; take prior_report out of data.context, or name them (`prior`) in the manifest"
        )
    sound: set[str] = set()  # studies whose chain of priors ends
    filled = []
    for study in studies:
        chain = [study.id]
        while (before := by_id[chain[-1]].prior) is not None and before not in sound:
            if before in chain:
                raise ValueError(
                    f"study {study.id!r}: its priors lead round in a circle ({' <- '.join([*chain, before])}); one "
                    "is not earlier"
                )
            chain.append(before)
        sound.update(chain)
        if study.prior is None:
            filled.append(study)
            continue
        prior = by_id[study.prior]
        if shared := {image.path for image in study.images} & {image.path for image in prior.images}:
            what = (
                f"study {study.id!r}: its prior {prior.id!r} has the same image ({min(shared)}), so its report is "
                "of this study"
            )
            raise ValueError(f"{what}; write null as its prior, or mend the images")
        filled.append(replace(study, prior_report=prior.report))
    return filled
