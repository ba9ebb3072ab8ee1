"""`qwen-ray key`: a new API key, and what of it belongs into the settings."""

from __future__ import annotations

import json

from qwen_ray.api_keys import ApiKey, new_key
from qwen_ray.commands.console import out


def run_key(name: str | None, key: str | None, *, as_json: bool) -> None:
    """`key`: an existing one, which is not shown. Raises SettingsError."""
    made = new_key() if key is None else None
    entry = ApiKey.of(made or key or "", name)
    shown = {"id": entry.id, "sha256": entry.sha256}
    if as_json:
        out.print(json.dumps({"key": made, **shown} if made else shown), markup=False, soft_wrap=True)
        return
    if made:
        out.print(
            f"{made}\n\nThis is the key, for whoever will send it; it is kept nowhere. What the server is told, under "
            "http.api_keys in the settings or in the file that --api-keys-file names:\n",
            markup=False,
        )
    out.print(f"- {json.dumps(shown)}", markup=False, soft_wrap=True)
