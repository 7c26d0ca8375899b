from __future__ import annotations

import pytest
from real_data import REPORTS, needs_reports

from inlay.data.read import read_rows
from inlay.data.rows import normalise
from inlay.data.split import split
from inlay.errors import DataError

PROMPT = "Findings: {findings}\nImpression:"

pytestmark = [
    pytest.mark.real,
    needs_reports,
]


def test_real_reports_name_their_empty_rows_and_split_by_uid() -> None:
    raw = read_rows(REPORTS)
    with pytest.raises(DataError, match=r"reports\.csv, line \d+: 'findings' is blank"):
        normalise(raw, prompt=PROMPT, completion="impression")
    rows = normalise(raw, prompt=PROMPT, completion="impression", group="uid", skip_empty=True)
    assert (len(rows), len(rows.skipped)) == (2831, 520)
    parts = split(rows)
    assert [len(part) for part in parts] == [2265, 283, 283]
    uids = [set(part.groups or ()) for part in parts]
    assert sum(map(len, uids)) == len(set.union(*uids))
