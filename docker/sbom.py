"""The Python packages of this environment as a CycloneDX 1.6 bill of materials, on standard output.

It describes the environment itself, not the lock file, and so what was actually installed. Debian's packages are in
/var/lib/dpkg/status, which scanners read. It uses only the standard library, so nothing is installed to make the list.
"""

import importlib.metadata
import json
import re


def main() -> None:
    """Print the list, sorted and without times, so that equal environments have equal lists."""
    found = {re.sub(r"[-_.]+", "-", d.name).lower(): d for d in importlib.metadata.distributions()}
    components = [
        {
            "type": "library",
            "name": name,
            "version": package.version,
            "purl": f"pkg:pypi/{name}@{package.version}",
            "bom-ref": f"pkg:pypi/{name}@{package.version}",
            **({"licenses": [{"license": {"name": text}}]} if (text := licence(package)) else {}),
        }
        for name, package in sorted(found.items())
    ]
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}
    print(json.dumps(bom, indent=1))


def licence(package: importlib.metadata.Distribution) -> str | None:
    """The licence as the package states it, if that is a single short line."""
    said = package.metadata.get("License-Expression") or package.metadata.get("License") or ""
    return said if said and "\n" not in said and len(said) < 100 else None


if __name__ == "__main__":
    main()
