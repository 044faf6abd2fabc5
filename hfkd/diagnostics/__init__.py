"""Questions about a run: arrays in, numbers (`metrics`) or figures (`plots`) out. Nothing here trains a model.

`hfkd.diagnostics.report(student, teacher, dataset)` asks both models and gathers the rest. The names below are loaded when
they are first used, because most of this folder needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "DiagnosticsCallback": "hfkd.diagnostics.callback",
    "FidelityReport": "hfkd.diagnostics.fidelity",
    "report": "hfkd.diagnostics.fidelity",
    "report_of_logits": "hfkd.diagnostics.fidelity",
}
__all__ = ["DiagnosticsCallback", "FidelityReport", "report", "report_of_logits"]

if TYPE_CHECKING:
    from hfkd.diagnostics.callback import DiagnosticsCallback
    from hfkd.diagnostics.fidelity import FidelityReport, report, report_of_logits


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hfkd.diagnostics' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)
