"""All forms of packages, one row each."""

from __future__ import annotations

from collections.abc import Mapping

from xkv_fx.engines import aoti, pt2
from xkv_fx.engines.form import PackageForm
from xkv_fx.engines.targets import Target
from xkv_fx.engines.tensorrt import form as tensorrt
from xkv_fx.runtime.state import GRAPH_KINDS, GraphKind

PACKAGE_FORMS: Mapping[str, PackageForm] = {"aoti": aoti.FORM, "program": pt2.FORM, "tensorrt": tensorrt.FORM}


def forms_of(target: Target) -> dict[GraphKind, PackageForm]:
    """The form of each package of a target."""
    return {kind: PACKAGE_FORMS[target.form_of(kind)] for kind in GRAPH_KINDS}
