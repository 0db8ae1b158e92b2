"""Who may use the JupyterLab that `labkit open` starts: whoever has its token, or its password, and nobody else."""

from __future__ import annotations

import secrets
from typing import Any

from jupyter_server.auth.identity import PasswordIdentityProvider
from traitlets import validate


class Guarded(PasswordIdentityProvider):
    """Jupyter's own way to tell who asks, save that it is never open to all.

    An empty token, in a settings file or in a file that JUPYTER_TOKEN_FILE names, switches Jupyter's check off. Here it
    stands for a new, random token, unless there is a password.
    """

    @validate("token")
    def _never_empty(self, proposal: Any) -> str:
        if proposal["value"].strip() or self.hashed_password:
            return proposal["value"]
        self.token_generated = True  # so that the address that is printed holds it
        return secrets.token_hex(24)
