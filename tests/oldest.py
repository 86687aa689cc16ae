"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `python tests/oldest.py EXTRA ...`."""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def required(extras: list[str]) -> list[Requirement]:
    """List what the package and some of its extras ask for, following extras that name others."""
    found = []
    for text in [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]:
        one = Requirement(text)
        found += required(sorted(one.extras)) if one.name == PROJECT["name"] else [one]
    return found


def lowest(requirement: Requirement) -> Version:
    """Return the version after `>=`, which each requirement must have."""
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return Version(bound)


if __name__ == "__main__":
    floors: dict[str, Version] = {}
    for requirement in required(sys.argv[1:]):
        if requirement.marker is None or requirement.marker.evaluate():
            floors[requirement.name] = max(lowest(requirement), floors.get(requirement.name, Version("0")))
    print("\n".join(f"{name}=={version}" for name, version in sorted(floors.items())))
