"""What mkdocs does beyond its configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> Any:
    """Leaves pages out of the navigation that a benchmark writes and that has not been run yet."""
    for section in config["nav"]:
        for pages in section.values() if isinstance(section, dict) else ():
            if section.keys() == {"Benchmarks"}:
                missing = [page for page in pages if not (Path(config["docs_dir"]) / page).exists()]
                for page in missing:
                    pages.remove(page)
                    _LOG.info("%s is not written yet, and left out", page)
    return config
