"""The date of a build, from the clock or from the variable SOURCE_DATE_EPOCH."""

from __future__ import annotations

import pytest

from openneutron.errors import OptionError
from openneutron.workflow.from_settings import DATE_VARIABLE, _today


@pytest.mark.parametrize(("seconds", "date"), [("0", "1970-01-01"), ("1700000000", "2023-11-14")])
def test_the_variable_gives_the_date(monkeypatch: pytest.MonkeyPatch, seconds: str, date: str) -> None:
    monkeypatch.setenv(DATE_VARIABLE, seconds)
    assert _today() == date


@pytest.mark.parametrize("seconds", ["-5", "1.5", "tomorrow", "²", "9" * 12, "9" * 17, "9" * 40, "9" * 5000])
def test_a_number_that_is_not_a_date_is_refused(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv(DATE_VARIABLE, seconds)
    with pytest.raises(OptionError, match="SOURCE_DATE_EPOCH must be a number of seconds since 1970, up to the year"):
        _today()
