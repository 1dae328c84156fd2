"""Gates: one family a file, each with its formula, defaults and paper."""

from .attention_router import AttentionRouter
from .attribute import AttributeRouter
from .base import Router
from .base_layers import BASERouter
from .conditional import ConditionalRouter
from .dense import DenseRouter
from .dense_to_sparse import DenseToSparseRouter, SMoEDropoutRouter
from .dselect_k import DSelectKRouter
from .dynamic import DynamicRouter
from .emoe import EMoERouter
from .expert_choice import ExpertChoiceRouter
from .gemma import Gemma4Router
from .gshard import GShardRouter
from .hash import HashRouter
from .hierarchical import HierarchicalRouter
from .label import DomainRouter, LabelRouter, PanGuRouter, TaskRouter
from .llama_moe import LLaMAMoERouter
from .meo import MEORouter
from .merging import LoryRouter, SMEARRouter
from .mixture_of_tokens import MoTRouter
from .moduleformer import ModuleFormerRouter
from .moe_plus_plus import MoEPlusPlusRouter
from .moebert import MoEBERTRouter
from .moefication import MoEficationRouter
from .mole import MoLERouter
from .mor1e import MoR1ERouter
from .null_expert import NullExpertRouter
from .output_masking import OutputMaskingRouter
from .patch import PatchRouter
from .product_key import ProductKeyRouter
from .prototype import PrototypeRouter
from .random_expert import RandomRouter
from .remoe import ReMoERouter
from .scored_hash import ScoredHashRouter
from .sentence import SentenceRouter
from .sinkhorn import SinkhornRouter
from .sira import SiRARouter
from .skywork import SkyworkRouter
from .smop import SMoPRouter
from .soft import SoftRouter
from .sparse_mixer import SparseMixerRouter
from .stable import StableMoERouter
from .switch_head import SwitchHeadRouter
from .task_experts import MoCLERouter, TaskMixtureRouter
from .token_rounding import TokenRoundingRouter
from .topk import TopKRouter
from .unipelt import UniPELTRouter
from .xmoe import XMoERouter

__all__ = [
    "AttentionRouter",
    "AttributeRouter",
    "BASERouter",
    "ConditionalRouter",
    "DSelectKRouter",
    "DenseRouter",
    "DenseToSparseRouter",
    "DomainRouter",
    "DynamicRouter",
    "EMoERouter",
    "ExpertChoiceRouter",
    "GShardRouter",
    "Gemma4Router",
    "HashRouter",
    "HierarchicalRouter",
    "LLaMAMoERouter",
    "LabelRouter",
    "LoryRouter",
    "MEORouter",
    "MoCLERouter",
    "MoEBERTRouter",
    "MoEPlusPlusRouter",
    "MoEficationRouter",
    "MoLERouter",
    "MoR1ERouter",
    "MoTRouter",
    "ModuleFormerRouter",
    "NullExpertRouter",
    "OutputMaskingRouter",
    "PanGuRouter",
    "PatchRouter",
    "ProductKeyRouter",
    "PrototypeRouter",
    "RandomRouter",
    "ReMoERouter",
    "Router",
    "SMEARRouter",
    "SMoEDropoutRouter",
    "SMoPRouter",
    "ScoredHashRouter",
    "SentenceRouter",
    "SiRARouter",
    "SinkhornRouter",
    "SkyworkRouter",
    "SoftRouter",
    "SparseMixerRouter",
    "StableMoERouter",
    "SwitchHeadRouter",
    "TaskMixtureRouter",
    "TaskRouter",
    "TokenRoundingRouter",
    "TopKRouter",
    "UniPELTRouter",
    "XMoERouter",
]
