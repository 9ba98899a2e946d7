"""What the chapter on the families shows is what the code prints."""

from __future__ import annotations

from tests.families.document import CHAPTER, updated


def test_the_chapter_is_current() -> None:
    text = CHAPTER.read_text()
    assert updated(text) == text, "run python -m tests.families.document"
