"""The metrics of the package `radeval`: what each gives, what tells it from others of its name, and which may be
asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIX = "radeval:"
DESCRIBED = "2.2.1"  # the version whose metrics these are


@dataclass(frozen=True)
class Metric:
    """A metric of RadEval's.

    Attributes:
        outputs: what it gives of each report; the first is meant where the metric alone is named.
        variant: what tells it from others of its name.
        sends: it asks an API of somebody's, which is sent the reports.
        of_all: a report's value depends on the other references that come with it.
    """

    outputs: tuple[str, ...]
    variant: str
    sends: bool = False
    of_all: bool = False


METRICS: Mapping[str, Metric] = {
    "radgraph": Metric(
        ("radgraph_partial", "radgraph_simple", "radgraph_complete"),
        "F1 of RadGraph-XL's entities: simple, token and label; partial, also whether it has a relation; complete, "
        "also which relations to what",
    ),
    "ratescore": Metric(("ratescore",), "RaTE-NER-Deberta and BioLORD-2023-C; 0.5 where a side has no entity"),
    "bertscore": Metric(("bertscore",), "F1 of distilbert-base-uncased, layer 5, rescaled by its baseline, no IDF"),
    "radcliq": Metric(
        ("radcliq_v1",),
        "RadCliQ-v1, lower is better; its BERTScore (distilroberta-base, layer 5) weighs words by the IDF of these "
        "references, ReXrank's does not; RadEval prints 1 / mean",
        of_all=True,
    ),
    "green": Metric(("green",), "GREEN-radllama2-7b, run here; its repository's own code is run"),
    "radgraph_radcliq": Metric(("radgraph_radcliq",), "mean of entity and relation F1, RadGraph, as inside RadCliQ"),
    "radeval_bertscore": Metric(("radeval_bertscore",), "F1 of RadEvalModernBERT, layer 22, not rescaled"),
    "f1chexbert": Metric(
        ("f1chexbert_sample_acc_5", "f1chexbert_sample_acc_all"), "of one report: the share of labels that agree"
    ),
    "srrbert": Metric(
        ("srrbert_weighted_f1", "srrbert_weighted_precision", "srrbert_weighted_recall"), "SRR-BERT, leaves and status"
    ),
    "temporal": Metric(("temporal_f1",), "F1 of temporal entities, stanza's radiology package"),
    "bleu": Metric(("bleu",), "BLEU-4 of one report"),
    "rouge": Metric(("rougeL", "rouge1", "rouge2"), "rouge_score's F, with its stemmer"),
    "f1radbert_ct": Metric(("f1radbert_ct_sample_acc",), "of CT reports"),
    "crimson": Metric(("crimson",), "CRIMSON, an LLM's judgement", sends=True),
    "mammo_green": Metric(("mammo_green",), "MammoGREEN, an API's judgement of mammography", sends=True),
    "radfact_ct": Metric(
        ("radfact_ct_f1", "radfact_ct_precision", "radfact_ct_recall"), "RadFact-CT, an API's judgement", sends=True
    ),
}
DEFAULT = ("radgraph", "ratescore", "bertscore", "radcliq")


def require_metrics(names: Iterable[str], send_text_to: Iterable[str] = (), *, how: str = "") -> None:
    """Refuse a metric that is none, and one that sends reports to an API without having been named for that.

    Args:
        how: how it would be named.

    Raises:
        ValueError: names it, and those that there are.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"RadEval has no metric {name!r}; there are {', '.join(METRICS)}")
        if METRICS[name].sends and name not in send_text_to:
            raise ValueError(
                f"RadEval's {name} sends the reports to an API of somebody's, patient data with them: refused{how}"
            )


def metric_of(term: str) -> tuple[str, str]:
    """The metric and the output that `radeval:NAME` means; NAME is one of either.

    Raises:
        ValueError: it is none.
    """
    name = term.removeprefix(PREFIX)
    if name in METRICS:
        return name, METRICS[name].outputs[0]
    for metric, what in METRICS.items():
        if name in what.outputs:
            return metric, name
    raise ValueError(f"{term!r}: RadEval has no metric {name!r}; there are {', '.join(METRICS)}")
