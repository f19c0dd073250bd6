"""What a server's processes are told beside their models: environment variables, since a store's address may hold a
password, and configurations are told to whoever asks."""

from __future__ import annotations

USERS_VARIABLE = "TRIRANK_USERS"
"""Address of the user store (stores.open_store); empty or absent: none, all users are new."""
CATALOGUE_VARIABLE = "TRIRANK_CATALOGUE"
"""File of what changed of the catalogue (stores.overlay.STATE)."""
COUNTS_VARIABLE = "TRIRANK_COUNTS"
"""File of feedback's counts (stores.overlay.COUNTS), which the model ``feedback`` writes."""
SERVED_VARIABLE = "TRIRANK_SERVED"
"""Link to the release that is served now."""
REQUESTS_VARIABLE = "TRIRANK_REQUEST_LOG"
"""Folder that requests are logged to, ``FOLDER``, or ``FOLDER?share=0.01&tensors=1``."""
KEYS_VARIABLE = "TRIRANK_KEYS"
"""Master keys of what is sealed at rest (master_keys.MasterKeys): a file, or ``NAME:BASE64``."""
TOKENS_VARIABLE = "TRIRANK_TOKENS"
"""File of callers' tokens (trirank_backend.callers)."""
OWN_TOKEN_VARIABLE = "TRIRANK_OWN_TOKEN"
"""Digest of the token of whoever runs the server."""
