"""The quantities of an analysis, in groups chosen by name, since some cost more than others. One group per file."""

from collections.abc import Iterable

from .base import Group
from .distance import Distance
from .eigenvalues import Eigenvalues
from .features import Features
from .maps import Maps
from .rollout import Rollout
from .sinks import Sinks
from .tokens import Tokens

__all__ = ["DEFAULT", "GROUPS", "QUANTITIES", "Group", "choose"]

GROUPS: dict[str, type[Group]] = {
    group.name: group for group in (Features, Maps, Tokens, Sinks, Distance, Rollout, Eigenvalues)
}
DEFAULT = ("features", "maps")
# Quantity -> its description with its unit, as in the report and in analysis.json.
QUANTITIES = {name: text for group in GROUPS.values() for name, text in group.quantities.items()}


def choose(names: Iterable[str]) -> list[type[Group]]:
    """The groups with these names, each once, in the order of the report; ``all`` means every group.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in (*GROUPS, "all")]
    if unknown or not names:
        raise ValueError(f"quantities {', '.join(unknown) or '(none)'}: choose of {', '.join(GROUPS)}, or all")
    return [group for name, group in GROUPS.items() if name in names or "all" in names]
