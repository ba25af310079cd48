"""Audit: finds out whether published memory is written to, and names the tensors.

`places` says which bytes are whose, `chunks` how they are cut, and `changes` what a difference means; none of them reads memory. `audited` does.
"""

from gms_core.audit.audited import Audited, Look
from gms_core.audit.changes import Change, Part
from gms_core.audit.places import Tensor

__all__ = ["Audited", "Change", "Look", "Part", "Tensor"]
