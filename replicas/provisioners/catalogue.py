"""What machines cost by SkyPilot's catalogues, as far as they lie on this machine: no account, no network.

    python -m replicas.provisioners.catalogue H200:8 --clouds aws     {"H200:8": {"spot": [9.5, "AWS"], ...}}

A process of its own: `import sky` takes seconds and 160 MB, and a catalogue that is to be renewed first may
hang without network. Who asks sets a deadline.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from replicas.provisioners.sdk import import_sky

DEADLINE: Final = 30.0   # s; the import takes 4 s, on a busy machine 15


@dataclass(frozen=True, slots=True)
class Price:
    """The cheapest offer: dollars per hour of one node, and the cloud whose it is."""

    dollars: float
    cloud: str


Prices = dict[str, dict[str, Price]]
"""By accelerators ("H200:8"), then by market ("on-demand", "spot")."""


def clouds(home: Path) -> list[str]:
    """Those whose catalogue is here: SkyPilot keeps what it has once fetched."""
    found = home.glob(".sky/catalogs/*/*/vms.csv")
    return sorted({path.parent.name for path in found if path.parent.name != "common"})


def ask(
    kinds: Sequence[str], home: Path, *, deadline: float = DEADLINE, command: Sequence[str] | None = None
) -> Prices:
    """Prices of `kinds`; those that are not known here, or not within the deadline, are left out."""
    known = clouds(home)
    if not kinds or not known:
        return {}
    program = command or (sys.executable, "-m", "replicas.provisioners.catalogue")
    try:
        done = subprocess.run(
            [*program, *kinds, "--clouds", *known],
            capture_output=True, text=True, timeout=deadline, check=True,
        )   # fmt: skip
        said = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}
    return {kind: {m: Price(*price) for m, price in offers.items()} for kind, offers in said.items()}


def look(sky: Any, kinds: Iterable[str], known: Sequence[str]) -> Prices:
    """The cheapest offers for `kinds` in the catalogues of these clouds."""
    found: Prices = {}
    for kind in kinds:
        name, _, count = kind.partition(":")
        listed = sky.catalog.list_accelerators(
            name_filter=f"^{re.escape(name)}$", clouds=list(known), case_sensitive=False, all_regions=True
        )
        offers: dict[str, Price] = {}
        for offer in (one for some in listed.values() for one in some):
            if abs(offer.accelerator_count - float(count or 1)) > 0.01:
                continue
            for market, dollars in (("on-demand", offer.price), ("spot", offer.spot_price)):
                if isinstance(dollars, int | float) and dollars > 0:   # nan: not offered
                    cheaper = market not in offers or dollars < offers[market].dollars
                    if cheaper:
                        offers[market] = Price(float(dollars), str(offer.cloud))
        if offers:
            found[kind] = offers
    return found


def main() -> None:
    at = sys.argv.index("--clouds")
    found = look(import_sky(), sys.argv[1:at], sys.argv[at + 1 :])
    told = {k: {m: (p.dollars, p.cloud) for m, p in offers.items()} for k, offers in found.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
