"""One run in several processes: prompts and trees are divided, gradients summed; docs/distributed.md."""

from ibtpo.distributed.follower import Follower
from ibtpo.distributed.group import ALONE, Group, PeerFailed
from ibtpo.distributed.grower import make_grower
from ibtpo.distributed.launch import device_name, join, restarted
from ibtpo.distributed.learner import Mode, make_learner

__all__ = [
    "ALONE",
    "Follower",
    "Group",
    "Mode",
    "PeerFailed",
    "device_name",
    "join",
    "make_grower",
    "make_learner",
    "restarted",
]
