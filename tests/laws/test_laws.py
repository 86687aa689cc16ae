"""Every law for every rule."""

import pytest
from every_rule import LAWS

from rwalk.rules import rules


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")  # some importances are large, and the gradient pull says so
@pytest.mark.parametrize("name", rules())
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, name):
    law(rules()[name]())
