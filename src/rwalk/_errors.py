"""How the library complains: what came, what was expected, what to do."""


def explain(came: str, expected: str, remedy: str) -> str:
    """Join the three parts that every error message of the library has."""
    return f"Got {came}. Expected {expected}. {remedy}"
