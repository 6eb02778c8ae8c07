"""Compiles the kernels when a wheel or an editable installation is made.

Without a C compiler the build goes on, and says so: the package then does the same with PyTorch.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = "lightning_byz/numerics/kernels"


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled kernels to what is built."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the build. ``version``: "standard" or "editable"."""
        source = Path(self.root, _KERNELS, "build.py")
        spec = importlib.util.spec_from_file_location("build_kernels", source)
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        if version == "editable":
            folder = source.parent
        else:
            self._scratch = tempfile.TemporaryDirectory()  # until the wheel is written
            folder = Path(self._scratch.name)
        try:
            made = build.build(folder)
        except build.NoCompilerError as error:
            self.app.display_warning(
                f"lightning-byz is built without compiled kernels, because {error}. Medians "
                "and trimmed means take four to nine times as long, other rules about twice."
            )
            return
        if version != "editable":
            for path in made:
                build_data["force_include"][str(path)] = f"{_KERNELS}/{path.name}"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
