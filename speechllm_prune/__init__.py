"""Measure, prune and heal the decoder layers of SpeechLLMs.

Importing the package is light: torch and transformers are imported when a name that needs them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechllm_prune.hparams import load_hparams
    from speechllm_prune.models.speechllm import SpeechLLM

__version__ = "0.1.0"
__all__ = ["SpeechLLM", "__version__", "load_hparams"]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use (PEP 562), so that `import speechllm_prune` stays fast."""
    if name == "SpeechLLM":
        from speechllm_prune.models.speechllm import SpeechLLM

        return SpeechLLM
    if name == "load_hparams":
        from speechllm_prune.hparams import load_hparams

        return load_hparams
    if name == "prune":
        import importlib

        return importlib.import_module("speechllm_prune.prune")
    raise AttributeError(f"module 'speechllm_prune' has no attribute {name!r}")
