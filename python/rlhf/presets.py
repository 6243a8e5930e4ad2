"""Presets: the conventions of a reference implementation as values of our flags, by stage.

`rlhf ppo --preset NAME` fills them in where neither a flag nor `--config` says otherwise.
"""

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {}
