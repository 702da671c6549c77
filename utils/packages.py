"""The packages that the project needs, and the way out where they are missing. Imports none of them."""

import importlib.util
import os
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "yaml", "PIL", "tqdm", "safetensors", "matplotlib")
_VENV = Path(__file__).resolve().parents[1] / ".venv"  # of experiments/_setup.sh


def missing_packages() -> str | None:
    """A sentence for a Python that lacks packages; None for one that has all."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    way_out = (
        "bash experiments/quickstart.sh installs them in .venv, sh install_requirements.sh in the environment in use"
    )
    if (_VENV / "bin/activate").exists() and not (_VENV / "set_up_incomplete").exists():
        way_out = f".venv in the project's folder has them: source {os.path.relpath(_VENV)}/bin/activate"
    return f"this Python has no {', '.join(missing)}: {way_out}"
