from __future__ import annotations

import functools

import pytest

from tests.doctor.machines import made


@pytest.fixture
def build(tmp_path):
    """Makes a machine of the files it is given."""
    return functools.partial(made, tmp_path)
