"""What verl imports by the entry point `verl.plugins`: each part registers itself, and what went wrong is kept.

verl hides the exceptions of plug-ins at DEBUG. `python -m rlvr_ops.integrations.verl` shows what is here.
"""

import importlib
import logging
import os
from importlib.util import find_spec

PARTS = {
    "losses": "policy losses, actor_rollout_ref.actor.policy_loss.loss_mode=ace",
    "trainer": "trainer, trainer.v1.trainer_mode=ace",
    "engine": "head, VERL_ENGINE_VENDOR=rlvr_ops",
}
FAILURES: dict[str, Exception] = {}


def load(part: str) -> None:
    """Import a part, which registers itself. A failure is logged and kept in FAILURES."""
    try:
        importlib.import_module(f"rlvr_ops.integrations.verl.{part}")
    except Exception as error:
        FAILURES[part] = error
        logging.getLogger(__name__).warning("rlvr_ops: %s could not be registered: %r", PARTS[part], error)


load("losses")
if find_spec("transfer_queue"):  # else verl's own trainers are not there either
    load("trainer")
if os.environ.get("VERL_ENGINE_VENDOR") == "rlvr_ops":  # importing verl's engines takes a second
    load("engine")
