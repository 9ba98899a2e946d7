"""What several tests of the runtime watch."""

from __future__ import annotations

import pytest

from einscade.runtime import tuning


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is tuned from here on, in order."""
    names: list[str] = []
    plain = tuning.tune

    def noting(name: str, *arguments: object) -> tuning.Tuned:
        names.append(name)
        return plain(name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "tune", noting)
    return names
