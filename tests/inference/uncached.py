"""Decoding without a cache: a full forward for every token."""

import jax
import numpy as np

import glmjax

LENGTH = 64
_forward = jax.jit(glmjax.forward, static_argnums=0)


def full_logits(config, params, ids, positions):
    """Logits [T, V] of one forward over tokens and their (position, block position), of which those
    before the first <sop> see each other."""
    tokens_BT = np.zeros((1, LENGTH), np.int32)
    positions_B2T = np.zeros((1, 2, LENGTH), np.int32)
    tokens_BT[0, : len(ids)] = ids
    positions_B2T[0, :, : len(ids)] = np.transpose(positions)
    context_B = np.array([ids.index(config.special_tokens.sop)])
    mask = glmjax.BlankMask.from_context(context_B, length=LENGTH)
    return np.asarray(_forward(config, params, tokens_BT, positions_B2T, mask))[0, : len(ids)]


def fill_greedily(config, params, ids, positions, limit, advance=0):
    """Fills one blank by a full forward per token. `ids` and `positions` end in the <sop> of the
    blank and grow by the piece, which is returned."""
    end = len(ids)
    while len(ids) < end + limit:
        new = int(full_logits(config, params, ids, positions)[-1].argmax())
        if new in (config.special_tokens.eop, config.special_tokens.eos):
            break
        position, block = positions[-1]
        ids.append(new)
        positions.append((position + advance, block + 1))
    return ids[end:]
