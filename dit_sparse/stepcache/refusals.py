"""Which caches cannot run on which model without harm, and why; found by running tiny models of every family.

The test is always the same: with the same inputs at every step, a skipped step must give what a computed one gives.
"""

from __future__ import annotations

import re
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module

from .names import FASTERCACHE, FIRST_BLOCK, MAGCACHE, SEACACHE, TAYLORSEER, TEACACHE, name_of
from .signals import MODULATED
from .teacache import blocks_of

RESIDUAL = (FIRST_BLOCK, MAGCACHE, TEACACHE, SEACACHE)  # put one sum in the place of the whole stack
BATCHED = ("cogvideox", "mochi", "allegro")  # conditional and unconditional half in one forward
DISTILLED = ("hunyuan", "flux")  # guidance is an input of the model

# Parts that add to the hidden states between two blocks, from outside of them: at a skipped step the loop of the
# model adds them once more to what the cached sum holds already.
BETWEEN_BLOCKS = {"vace_blocks": "what the VACE blocks add", "face_adapter": "what the face adapter adds"}


def reason_against(name: str, config: Any, model: Any, family: str) -> str:
    """Why a cache is refused on a model; empty when it is not.

    Args:
        name: of the cache.
        config: its configuration.
        model: the transformer.
        family: name of the model's family.
    """
    if not hasattr(model, "enable_cache"):
        return "this Diffusers gives it no enable_cache"
    if model.is_cache_enabled:
        return "a cache is already enabled on it; call disable_cache() first"
    if name in RESIDUAL:
        return _against_residual(name, model, family)
    if name == FASTERCACHE:
        return _against_fastercache(config, family)
    if name == TAYLORSEER:
        return _against_taylorseer(config, model)
    return ""


def against_ranks(step_cache: Any) -> str:
    """Why ranks that share a sequence (context parallelism) cannot run a cache; empty when they can.

    Args:
        step_cache: a name, or a configuration, what `resolve` returned included.
    """
    name = step_cache if isinstance(step_cache, str) else name_of(step_cache)
    if getattr(step_cache, "signal", None) == MODULATED:
        name = f"{TEACACHE} with signal={MODULATED!r}"
    elif name not in (FIRST_BLOCK, SEACACHE):
        return ""
    return (f"step_cache: {name} decides by the tokens of one rank, and ranks that decide differently wait for each "
            "other for ever; use another cache under context parallelism")


def _against_residual(name: str, model: Any, family: str) -> str:
    for part, text in BETWEEN_BLOCKS.items():
        if getattr(model, part, None) is not None:
            return f"{text} between the blocks would be added twice at a skipped step; use 'pab' or 'taylorseer'"
    if family == "motif":
        return "its decoder blocks hold the video twice, so that residuals of the stack do not fit; use 'taylorseer'"
    if name == SEACACHE:
        return ""  # it looks at the blocks itself
    blocks = blocks_of(model)
    if not blocks:
        return "it has no stack of transformer blocks that Diffusers' caches find"
    if name == FIRST_BLOCK and len(blocks) < 2:
        return "it needs at least two transformer blocks"
    found = []
    for block in blocks:
        try:
            found.append(TransformerBlockRegistry.get(unwrap_module(block).__class__))
        except ValueError:
            return (f"Diffusers' block registry has no {type(unwrap_module(block)).__name__}: how it returns its "
                    "streams is unknown; use 'taylorseer' or 'pab'")
    if name == FIRST_BLOCK:
        if any(data.hidden_states_argument_name != "hidden_states" for data in found):
            return "Diffusers' FirstBlockCache looks for an argument hidden_states that its blocks do not have"
        if found[0].return_encoder_hidden_states_index is not None and (
                found[-1].return_encoder_hidden_states_index is None):
            return "its first block returns text and image apart and its last one together; use 'magcache'"
    return ""


def _against_fastercache(config: Any, family: str) -> str:
    if family in DISTILLED and config.is_guidance_distilled or family in BATCHED:
        return ""
    if family in DISTILLED:
        return "the guidance of this family is distilled; set is_guidance_distilled=True"
    return ("it needs the unconditional and the conditional half in one forward, as in CogVideoX, Mochi and Allegro, "
            "or distilled guidance; here it would take one for the other")


def _against_taylorseer(config: Any, model: Any) -> str:
    if config.use_lite_mode:
        if not hasattr(model, "proj_out"):
            return ("use_lite_mode replaces the blocks by zeros and predicts the output of proj_out, which this model "
                    "does not have")
        return ""
    wanted = config.cache_identifiers
    names = [name for name, _ in model.named_modules()]
    if wanted and not any(re.fullmatch(pattern, name) for pattern in wanted for name in names):
        return f"cache_identifiers {list(wanted)} match no module"
    return ""
