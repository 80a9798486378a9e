"""Damaged folders of states and models, beside which `test_fuzz.py` runs the other kinds."""

import pytest
from test_fuzz import FOLDERS, bases, require_clean

__all__ = ["bases"]  # a fixture


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_case_ends_in_a_code_and_a_sentence_and_leaves_nothing(kind, bases, tmp_path):  # noqa: F811
    require_clean(kind, bases, tmp_path)
