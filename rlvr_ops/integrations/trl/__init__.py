"""ACE inside TRL: `ACEGRPOTrainer` in the place of `GRPOTrainer`, and `ACEMixin` for its subclasses."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

LEAST = "1.16"


def _check_version() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError('rlvr_ops.integrations.trl needs TRL: pip install "trl>=1.16"') from None
    if Version(found) < Version(LEAST):
        raise ImportError(f"rlvr_ops.integrations.trl needs TRL >= {LEAST}, found {found}: pip install -U trl")


_check_version()

from rlvr_ops.integrations.trl.config import ACEArguments, ACEGRPOConfig  # noqa: E402
from rlvr_ops.integrations.trl.mixin import ACEMixin  # noqa: E402
from rlvr_ops.integrations.trl.trainer import ACEGRPOTrainer  # noqa: E402

__all__ = ["ACEArguments", "ACEGRPOConfig", "ACEGRPOTrainer", "ACEMixin"]
