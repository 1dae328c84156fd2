"""Attention whose heads or projections are experts: MoA and JetMoE, SwitchHead, MoH."""

from .attend import KeyValues
from .moa import MoA
from .moh import MoH
from .positions import rotary
from .switch_head import HeadExperts, SwitchHead

__all__ = ["HeadExperts", "KeyValues", "MoA", "MoH", "SwitchHead", "rotary"]
