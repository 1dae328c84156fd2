"""Gates: one family a file, each with its formula, defaults and paper."""

from .base import Router
from .topk import TopKRouter

__all__ = ["Router", "TopKRouter"]
