"""Every law for every rule."""

import pytest

from laws import LAWS
from rwalk.importance import rules


@pytest.mark.filterwarnings("ignore:Got strength")  # some importances are large, and the gradient pull says so
@pytest.mark.parametrize("name", rules())
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, name):
    law(rules()[name]())
