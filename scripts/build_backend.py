"""The PEP 517 backend of clext: setuptools, and the right torch to compile against.

torch's C++ interface changes with every minor version, so the extension must be compiled against
the torch it will run with. Installers build in an isolated environment that hides it and would
fetch another one. This backend looks for torch in the environment that the wheel is for, and asks
for a download only where there is none.
"""

from __future__ import annotations

import importlib.util
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta

ConfigSettings = dict[str, Any] | None

# Hooks that need no torch: a source archive is the same for every torch.
build_sdist = build_meta.build_sdist


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    requirements = [] if use_installed_torch() else ["torch"]
    if shutil.which("ninja") is None:
        requirements.append("ninja")
    return requirements


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    use_installed_torch()
    name: str = build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    return name


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    use_installed_torch()
    name: str = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    return name


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    use_installed_torch()
    # setuptools would pack modules that an earlier build left there and that exist no more; object
    # files, which cost the time, lie elsewhere and are kept.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    use_installed_torch()
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return name


def check_setuptools(version: str = setuptools.__version__) -> None:
    """Refuses a setuptools that pyproject.toml does not ask for, which --no-build-isolation allows.

    Before 70.1 building a wheel needs the package wheel, and fails without a useful message.
    """
    if tuple(map(int, version.split(".")[:2])) < (70, 1) and not importlib.util.find_spec("wheel"):
        sys.exit(
            f"clext: setuptools {version} is too old to build a wheel; run "
            "`pip install --upgrade setuptools ninja`, or install without --no-build-isolation."
        )


def use_installed_torch() -> bool:
    """Makes an installed torch importable; returns whether there is one."""
    check_setuptools()
    if importlib.util.find_spec("torch"):
        return True
    folder = find_torch(installed_packages())
    if folder is None:
        return False
    print(f"clext: compiling against the torch that is installed in {folder}")
    # At the end: everything that the isolated environment has itself, setuptools first of all,
    # comes from there.
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    return True


def find_torch(folders: Iterable[str | Path]) -> Path | None:
    """Returns the first folder that holds an importable torch package."""
    for folder in map(Path, folders):
        if (folder / "torch" / "__init__.py").is_file():
            return folder
    return None


def installed_packages() -> list[str]:
    """The package folders of the interpreter that runs, whether or not sys.path shows them.

    An isolated build by pip runs the interpreter of the target environment with a sys.path of its
    own; sysconfig and site still know where that environment keeps its packages.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        # Outside a virtual environment, a user's own packages are imported as well.
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))
