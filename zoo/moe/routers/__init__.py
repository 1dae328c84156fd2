"""Gates: one family a file, each with its formula, defaults and paper."""

from .base import Router
from .sinkhorn import SinkhornRouter
from .topk import TopKRouter

__all__ = ["Router", "SinkhornRouter", "TopKRouter"]
