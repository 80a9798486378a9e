"""The page of evidence: what verdicts intervals give, and that the page is what the stored results say."""

import pytest

from benchmarks import ablations, evidence
from benchmarks.evidence import CONTRADICTED, OVERLAP, SHOWN, Interval


@pytest.mark.parametrize(
    ("ours", "other", "lower", "verdict"),
    [
        ((0.9, 0.85, 0.95), (0.7, 0.6, 0.84), False, SHOWN),
        ((0.9, 0.85, 0.95), (0.7, 0.6, 0.85), False, OVERLAP),
        ((0.7, 0.6, 0.8), (0.9, 0.85, 0.95), False, CONTRADICTED),
        ((0.01, 0.0, 0.02), (0.1, 0.05, 0.2), True, SHOWN),
        ((0.1, 0.05, 0.2), (0.01, 0.0, 0.02), True, CONTRADICTED),
        ((0.1, 0.05, 0.2), (0.1, 0.0, 0.3), True, OVERLAP),
    ],
)
def test_a_claim_is_shown_where_intervals_do_not_meet(ours, other, lower, verdict):
    found = evidence.against(Interval(*ours), Interval(*other), ("a", "b"), lower=lower)
    assert found.verdict == verdict
    assert "a " in found.figure
    assert "b " in found.figure


def test_visits_at_far_gaps_are_counted_together_and_near_ones_not():
    rows = {
        "recall guest, gap 8-15": {"value": [0.0, 0.0, 0.1], "n": 1000},
        "recall guest, gap 16-31": {"value": [0.5, 0.4, 0.6], "n": 30},
        "recall guest, gap 64+": {"value": [1.0, 0.9, 1.0], "n": 10},
        "recall scene, gap 16-31": {"value": [0.0, 0.0, 0.1], "n": 500},
    }
    found = evidence.recalled({"whole": rows}, "guest")
    assert found.value == pytest.approx((15 + 10) / 40)
    assert found.low < found.value < found.high


PAGE = """# Evidence

| claim | figure | verdict |
| --- | --- | --- |
| it holds | 0.1 [0.0, 0.2] | **shown** |

## Ablations

| at read | valid |
| --- | --- |
| it holds | 0.9 |
| sink 0 | 0.8 |
"""


def test_figures_that_moved_are_told_by_row_and_column():
    assert evidence.moved(PAGE, PAGE) == []
    after = PAGE.replace("0.8", "0.7").replace("**shown**", "**not shown**").replace("0.9", "0.95")
    assert evidence.moved(PAGE, after) == [
        "Evidence: it holds, verdict: **shown** -> **not shown**",
        "Ablations: it holds, valid: 0.9 -> 0.95",
        "Ablations: sink 0, valid: 0.8 -> 0.7",
    ]
    assert evidence.moved(PAGE, PAGE.replace("sink 0", "sink 4")) == [
        "Ablations: sink 0, valid: 0.8 -> gone",
        "Ablations: sink 4, valid: new -> 0.8",
    ]


def test_the_page_is_what_the_stored_results_say():
    """`make evidence` has been run since a result or a claim was changed."""
    found = {each.key: each.find() for each in evidence.CLAIMS}
    assert len(found) == len(evidence.CLAIMS)
    assert evidence.PAGE.read_text() == evidence.page(found)
    rows = evidence.figures_of(evidence.PAGE.read_text())
    assert len(rows) > len(evidence.CLAIMS) + len(ablations.ARMS)


def test_every_stored_ablation_is_one_of_these_weights_and_settings():
    stored = sorted(ablations.RESULTS.rglob("*.json"))
    arms = {
        ablations.path_of(model, arm): (model, arm)
        for model in ablations.MODELS
        for arm in ablations.ARMS
    }
    assert len(stored) >= len(ablations.ARMS)
    for path in stored:
        assert ablations.finished(*arms[path], videos=64), path
