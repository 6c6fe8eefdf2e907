"""Weights stored as integers with one scale per output row (GLM-130B section 4, chatglm-6b-int4).

An int4 matrix keeps two columns in a byte, the even one in the high half, as two's complement.
"""

import numpy as np


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """int8 [out, in] with values -8..7 from packed int8 [out, in / 2]."""
    high, low = packed >> 4, (packed << 4) >> 4  # shifts of int8 keep the sign
    return np.stack([high, low], axis=-1).reshape(*packed.shape[:-1], -1)


def dequantize(values: np.ndarray, scale: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """values [out, in] times scale [out], multiplied and rounded in `dtype`.

    The official GPU code multiplies in float16; float32 is what its scale and integers say.
    """
    return values.astype(dtype) * scale.astype(dtype)[:, None]
