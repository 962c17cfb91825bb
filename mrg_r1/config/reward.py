"""The section `reward` of a recipe: labeler, terms, and what each term is given."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mrg_r1.config.sections import DEVICE, Section
from mrg_r1.reward.additive import require_threshold
from mrg_r1.reward.judge import HttpSettings, is_url, require_url
from mrg_r1.reward.terms import BUILT_IN, require_known, require_signs


class HttpSection(Section):
    batch_size: int = Field(16, ge=1, description="Reports of one request to a judge. ours")
    parallel: int = Field(4, ge=1, description="Requests to a judge at a time. ours")
    timeout: float = Field(60, gt=0, description="Seconds in which a request must be answered whole. ours")
    retries: int = Field(
        3, ge=0, description="Times that a request is sent again that was not answered, or not with numbers. ours"
    )

    @property
    def settings(self) -> HttpSettings:
        return HttpSettings(self.batch_size, self.parallel, self.timeout, self.retries)


class RewardSection(Section):
    labeler: Path = Field(description="Labeler: a directory of `mrg-r1 labeler train`, or a CheXbert file. yours")
    tokenizer: str | None = Field(
        None, description="Tokenizer directory for a CheXbert checkpoint file (bert-base-uncased). yours"
    )
    references: Literal["labeler", "said"] = Field(
        "labeler",
        description="Whose labels of a reference count: the labeler's reading of its text, or the manifest's "
        "labels.said where a study has them, so that only the others are read. ours",
    )
    device: str = Field(
        "cpu",
        pattern=DEVICE,
        description="Physical device of the labeler, whatever the ranks see: cpu, cuda:7 (nvidia-smi's number) or a "
        "UUID. ours",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the labeler's weights. ours"
    )
    timeout: float = Field(
        600,
        gt=0,
        description="Seconds after which a reward service that is at work on one batch is taken for stuck and "
        "restarted. ours",
    )
    weights: dict[str, float] = Field(
        {"mccs": 0.75, "format": 0.25},
        description="Weights of the terms of the reward, as {mccs: 0.75, format: 0.25}; module:function is yours, "
        "radeval:METRIC one of RadEval's, http://HOST:PORT/PATH a judge's"
        + "".join(f"\n        {name}: {term.description}" for name, term in BUILT_IN.items())
        + ". paper",
    )
    http: HttpSection = Field(default_factory=HttpSection, description="How judges are asked. ours")
    send_text_to: list[str] = Field(
        [],
        description="Hosts other than this machine that judges may stand on, and so be sent reports and references: "
        "patient data. yours",
    )
    margin: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="m of MCCS; the paper's value is not known, `mrg-r1 reward-card` suggests one. ours",
    )
    margin_end: float | None = Field(
        None, ge=0, lt=1, description="The margin moves to this one in a straight line; None: it stays. ours"
    )
    margin_steps: int | None = Field(None, ge=1, description="Steps after which margin_end is reached. ours")
    ccs_weights: Literal["equal", "inverse_prevalence"] = Field(
        "equal",
        description="Weights inside the cosine of ccs and mccs: equal, or rare findings of the training reports count "
        "more. paper (equal)",
    )
    threshold: float | dict[str, float] | Literal["auto"] | None = Field(
        None,
        description="t of additive, which pays for saying a finding from the probability t on: a number between 0 and "
        "1, one for each of the 13 observations, or auto: for disease_micro13, from the training reports' labels. ours",
    )
    format: Literal["binary", "graded"] = Field(
        "binary", description="Format reward: all rules, or the share of them kept. ours"
    )
    normalise: Literal["total", "per_term"] = Field(
        "total", description="Normalise the weighted sum, or each term in its group before summing. ours"
    )

    @field_validator("weights")
    @classmethod
    def _known_terms(cls, weights: dict[str, float]) -> dict[str, float]:
        require_known(weights)
        require_signs(weights)
        return weights

    @model_validator(mode="after")
    def _judges(self) -> RewardSection:
        urls = [name for name in self.weights if is_url(name)]
        for url in urls:
            require_url(url, self.send_text_to)
        longest = self.http.settings.longest
        if urls and longest >= self.timeout:
            raise ValueError(
                f"reward.http: a request that is sent {self.http.retries + 1} times can take {longest:.0f} s, and "
                f"reward.timeout {self.timeout:.0f} s would end the reward service before it is given up; raise that, "
                "or lower reward.http.timeout or reward.http.retries"
            )
        return self

    @field_validator("threshold", mode="before")
    @classmethod
    def _between_0_and_1(cls, threshold: object) -> object:
        require_threshold(threshold)
        return threshold

    @model_validator(mode="after")
    def _belongs_to_additive(self) -> RewardSection:
        if self.threshold is None and "additive" in self.weights:
            raise ValueError(
                "reward.weights has additive and reward.threshold is not set: give the probability from which a "
                "finding is to be said, such as 0.3, or auto"
            )
        if self.threshold is not None and "additive" not in self.weights:
            raise ValueError(
                f"reward.threshold {self.threshold}: only the term additive has one, and reward.weights "
                f"{self.weights} has no additive; give it a weight, or leave threshold out"
            )
        return self

    @model_validator(mode="after")
    def _annealed(self) -> RewardSection:
        if (self.margin_end is None) != (self.margin_steps is None):
            raise ValueError(
                f"margin_end {self.margin_end} and margin_steps {self.margin_steps}: an annealed margin needs "
                "both, a constant one neither"
            )
        return self

    def margin_at(self, step: int) -> float:
        """m of the outer step `step`, counted from 0."""
        if self.margin_end is None or self.margin_steps is None:
            return self.margin
        return self.margin + (self.margin_end - self.margin) * min(step / self.margin_steps, 1.0)
