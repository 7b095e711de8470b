"""Running means and what JSON can hold."""

import json
import math

import torch

from oversmoothing.analysis import results as analysis_results
from oversmoothing.analysis.values import RunningMean


def test_running_mean_does_not_depend_on_the_batches() -> None:
    values = torch.randn(23, 3, dtype=torch.float64)
    running = RunningMean()
    for batch in values.split(5):
        running.update(batch)
    assert running.count == 23
    torch.testing.assert_close(running.mean, values.mean(dim=0))
    torch.testing.assert_close(running.std, values.std(dim=0, unbiased=False))


def test_what_json_has_no_number_for_becomes_null() -> None:
    ready = analysis_results.json_ready({"ratio": torch.tensor([1.0, math.inf]), "rank": math.nan, "name": "a"})
    assert json.loads(json.dumps(ready, allow_nan=False)) == {"ratio": [1.0, None], "rank": None, "name": "a"}
